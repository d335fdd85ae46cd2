// Addresses and layouts of Python's tensors, by C functions that torch publishes in Python: without
// torch's headers, and many times faster than a Python call per tensor.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

#include <utility>
#include <vector>

namespace spectral {

struct DLPackExchangeApi;

// Addresses of the first byte and of the one after the last; equal for a tensor without elements.
struct Span {
  int64_t begin, end;
};

// What a tensor is in memory.
struct TensorFacts {
  Span span;
  int64_t device, type;  // numbers that are equal for equal devices, and for equal dtypes
  int32_t n_dims;
  const int64_t *shape, *strides;  // the tensor's own; strides in elements
  bool is_freed;                   // its storage is smaller than it
  bool is_negative;                // its negative bit is set
};

// Appends what is compared of a tensor beside its address: equal for equal devices, dtypes, shapes
// and strides.
void append_layout(const TensorFacts& facts, std::vector<int64_t>& layouts);

// Returns the first overlap, in the order of addresses, that concerns one of the first `n_written`;
// (-1, -1): there is none. `order` has the indices of `spans`, and is sorted by their beginnings.
std::pair<int64_t, int64_t> overlap(const std::vector<Span>& spans, size_t n_written,
                                    std::vector<uint32_t>& order);

// torch's C functions of AOTInductor, aoti_torch_get_<name>, whose first argument is a handle of a
// tensor. They return 0, or an error.
struct TensorFunctions {
  int32_t (*data_ptr)(void* tensor, void** address);
  int32_t (*dim)(void* tensor, int64_t* n);
  int32_t (*sizes)(void* tensor, int64_t** shape);
  int32_t (*strides)(void* tensor, int64_t** strides);
  int32_t (*dtype)(void* tensor, int32_t* dtype);
  int32_t (*device_type)(void* tensor, int32_t* type);
  int32_t (*device_index)(void* tensor, int32_t* index);
  int32_t (*layout)(void* tensor, int32_t* layout);
  int32_t (*storage_size)(void* tensor, int64_t* bytes);
  int32_t (*storage_offset)(void* tensor, int64_t* elements);
};

// Reads tensors. What it finds is compared with what the tables were made from before any kernel
// runs.
class TensorReader {
 public:
  // `types` are torch.Tensor and torch.nn.Parameter; `functions` the addresses of TensorFunctions.
  // `impl_offset` is where an object of these types holds what its `_cdata` says, in bytes; -1:
  // that is not known. Throws std::invalid_argument where the type does not offer what is needed.
  TensorReader(const pybind11::tuple& types, const std::vector<int64_t>& functions,
               int64_t impl_offset);

  // Returns (addresses, layouts) of `written`, the same of `read`, and a problem. Addresses are one
  // int64 per tensor, as bytes, 0 for None; layouts are bytes that are equal for equal devices,
  // dtypes, shapes and strides, and for None in the same places. The problem is None or (what, i,
  // j): of the tensors, counted through both lists, i is "freed" (its storage is smaller than it)
  // or "negative" (its negative bit is set), or i and j have an "overlap" in memory and one of them
  // is written. Returns None where a tensor cannot be read this way.
  pybind11::object look(const pybind11::list& written, const pybind11::list& read) const;

  // Writes what `tensor` is to `found`; returns false if it cannot be read this way. Throws
  // pybind11::error_already_set.
  bool read(pybind11::handle tensor, TensorFacts& found) const;

  // The same several times as fast, for objects of the two types; numbers for devices and dtypes
  // are others.
  bool read_plain(pybind11::handle tensor, TensorFacts& found) const;

  pybind11::handle type() const { return type_; }

  // Whether read_plain may be used.
  bool is_plain(pybind11::handle tensor) const {
    PyTypeObject* const own = Py_TYPE(tensor.ptr());
    return impl_offset_ >= 0 &&
           (own == (PyTypeObject*)type_.ptr() || own == (PyTypeObject*)parameter_.ptr());
  }

 private:
  // Writes what depends on where the tensor, whose layout is in `found`, lies: at `address`, that
  // is `offset` elements of `size` bytes into its storage.
  void place_in_storage(pybind11::handle tensor, int64_t address, int64_t size, int64_t offset,
                        int64_t storage_bytes, TensorFacts& found) const;

  pybind11::object type_, parameter_, impl_, is_neg_;
  const DLPackExchangeApi* api_;
  TensorFunctions torch_;
  int64_t impl_offset_;
};

// Returns the values of `keys` in every dict of `dicts`, dict by dict; None for a missing one.
pybind11::list entries(const pybind11::list& dicts, const pybind11::tuple& keys);

// Writes addresses into a field of a table: row i gets addresses[refs[i]] + offsets[i], or 0 where
// that address is 0. `table`, `refs` and `offsets` are the addresses of their first elements; rows
// are `row_bytes` apart.
void place_rows(const int64_t* addresses, int64_t table, int64_t n_rows, int64_t row_bytes,
                int64_t refs, int64_t offsets);

// The same of addresses as bytes. Throws std::out_of_range for a row about none of them.
void place(const pybind11::bytes& addresses, int64_t table, int64_t n_rows, int64_t row_bytes,
           int64_t refs, int64_t offsets);

}  // namespace spectral
