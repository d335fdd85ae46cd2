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
bool has_openmp();

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

}  // namespace cpu
}  // namespace spectral
