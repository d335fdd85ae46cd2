// A step whose preparation is kept: one call compares what it was prepared from with the objects
// and tensors of this moment, and on a CPU takes the step.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

#include <vector>

#include "cpu/backend.h"
#include "tensors.h"

namespace spectral {

// A field of a table that holds an address of a gradient in each row, see `place`. `refs` count
// from the gradient `first` on.
struct GradColumn {
  int64_t first, table, n_rows, row_bytes, refs, offsets;
};

// A hyperparameter: a number in a dict, or element `index` of a tuple there. It is written to
// `address`, a float64, unless `is_fixed`: then another value is a change.
struct Option {
  int64_t index, address;  // index is -1 for a number
  bool is_fixed;
};

// What was seen when a step was prepared. The Python objects are the caller's, who passes them in
// every call, as `objects` of tables/guard.py: the garbage collector of Python would not see
// references from here.
class Guard {
 public:
  // Of look() and step(): what was prepared fits; or something has changed; or all fits but that
  // gradients are None. From 0 on: see step().
  enum Found : int64_t { kFits = -1, kChanged = -2, kMissing = -3 };

  // `grads` says of each holder what its gradient is: kIgnored, kNone or kTensor. Nothing may
  // overlap one of the gradients or of the first `n_written` tensors. A step edits the gradients
  // (`edits_grads`), or tensors that `objects` names. Throws std::invalid_argument for tensors that
  // cannot be read this way, or not be used. `counters` are addresses of int64 numbers that count
  // changes of tables: other changes than those made here are a change, too.
  Guard(const TensorReader& reader, const pybind11::tuple& objects, std::vector<int> grads,
        int64_t n_written, bool edits_grads, std::vector<GradColumn> columns,
        std::vector<int64_t> counters, std::vector<Option> options, std::vector<cpu::Job> jobs,
        pybind11::object increment_version, pybind11::object is_inference);

  // Compares, and writes the addresses of gradients into the tables where they are other ones.
  int64_t look(const pybind11::tuple& objects);

  // Looks, also at hyperparameters, which may change, and if all fits takes the step: runs the jobs
  // with up to `threads` threads. Returns kFits; kChanged or kMissing, with nothing done; or the
  // index of a job whose vectors have jumped (see cpu::run): it is half done, those after it are
  // not begun, and no edit has been counted.
  int64_t step(const pybind11::tuple& objects, int threads);

  // Versions in torch of the tensors whose versions are compared, after the last step.
  const std::vector<int64_t>& versions() const { return versions_; }

  static constexpr int kIgnored = -1, kNone = 0, kTensor = 1;

 private:
  struct Objects;
  bool is_same(const Objects& objects) const;
  Found compared(const Objects& objects);
  bool read(const Objects& objects, bool is_first);
  bool read_tensor(pybind11::handle tensor, bool is_written, int64_t& address, bool is_first);
  bool read_versions(const Objects& objects, bool is_first);
  bool read_options(const Objects& objects, std::vector<double>& found) const;
  void place_grads();

  const TensorReader* reader_;
  std::vector<int> wanted_;
  int64_t n_written_;
  bool edits_grads_;
  std::vector<GradColumn> columns_;
  std::vector<int64_t> counters_;
  std::vector<Option> options_;
  std::vector<cpu::Job> jobs_;
  pybind11::object increment_version_, is_inference_;
  pybind11::object grad_, requires_grad_of_, version_;  // descriptors of torch.Tensor

  std::vector<int64_t> layouts_;  // of the tensors, then of the gradients
  size_t in_layouts_ = 0;         // where the next one is
  std::vector<int64_t> addresses_;
  std::vector<int64_t> grads_now_, grads_placed_;  // addresses of gradients, 0 for none
  std::vector<char> requires_grad_;                // of the holders
  std::vector<int64_t> versions_, counts_;
  bool is_missing_ = false;  // whether a gradient is None where there was a tensor
  std::vector<Span> spans_;  // of what must not overlap
  std::vector<uint32_t> order_;
  pybind11::list grads_;  // while a call runs
};

}  // namespace spectral
