// The CPU backend: one parallel region per call over all matrices and elementwise parameters of a
// table.
#pragma once

#include <string>
#include <vector>

#include "../table.h"

namespace spectral {
namespace cpu {

std::vector<std::string> levels();        // that this processor supports, the best last
std::string level();                      // the level in use
void set_level(const std::string& name);  // throws std::invalid_argument
std::string without_openmp();             // why one thread is used; empty: as many as asked

void gram_matvec(const Header& header, int threads);
void transposed(const Header& header, int threads);
void collect(const Header& header, int64_t t, int64_t gram, int threads);
void normalize(const Header& header, int threads);
void rank_one(const Header& header, bool accumulate, int threads);
// Compares residual / sigma of every matrix with the number at `ratios` (float64, one per matrix).
// Returns whether one of them is above `least` and above `factor` times that number; otherwise
// writes the new numbers there. That of a zero matrix is 0.
bool jumps(const Header& header, int64_t ratios, double least, double factor);
void update(const Header& header, const Update& update, int threads);

// A step of one bucket; addresses of structs in table.h.
struct Job {
  int64_t header;
  int64_t update;  // of an optimizer; 0: the penalty's gradient is added to gradients
  int64_t ratios;  // jumps are looked for with these three, and counted behind it; 0: they are not
  double least, factor;
  int64_t steps, acts, n_steps;  // float32 arrays: the second is added to the first
};

// Takes a step in one parallel region. It begins with v_next, as a power iteration does that swaps
// v and v_next first: products, normalize and rank_one; or, of an optimizer, the step is counted,
// then update and normalize. v is then the vectors that the products were taken with. Returns
// whether vectors have jumped: the penalty's gradient is not added yet then. Throws std::bad_alloc,
// with nothing changed.
bool run(const Job& job, double expected_time, int threads);

// The time that `run` takes with one thread, in nanoseconds, roughly.
double expected_time(const Job& job);

}  // namespace cpu
}  // namespace spectral
