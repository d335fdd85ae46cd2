#include "tensors.h"

#include <stdint.h>

#include <vector>

namespace py = pybind11;

namespace spectral {
namespace {

// The part of the DLPack ABI, version 1, that is used here: github.com/dmlc/dlpack, dlpack.h.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t n_dims;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct DLPackExchangeApi {
  uint32_t major, minor;
  DLPackExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*dltensor_from_py_object)(void* object, DLTensor* out);  // may be null
  void* current_work_stream;
};

// Returns null where the type has no such table.
const DLPackExchangeApi* exchange_api(py::handle type) {
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* api = static_cast<const DLPackExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api != nullptr && api->major > 1) api = api->previous;
  if (api == nullptr || api->major != 1 || api->dltensor_from_py_object == nullptr) return nullptr;
  return api;
}

py::bytes as_bytes(const std::vector<int64_t>& numbers) {
  return py::bytes(reinterpret_cast<const char*>(numbers.data()), 8 * numbers.size());
}

}  // namespace

py::object describe(py::handle type, const py::list& tensors) {
  const DLPackExchangeApi* const api = exchange_api(type);
  if (api == nullptr) return py::none();
  std::vector<int64_t> addresses, layouts;
  addresses.reserve(tensors.size());
  layouts.reserve(8 * tensors.size());
  for (const py::handle tensor : tensors) {
    DLTensor x{};
    if (!PyObject_TypeCheck(tensor.ptr(), (PyTypeObject*)type.ptr())) return py::none();
    if (api->dltensor_from_py_object(tensor.ptr(), &x) != 0) {
      PyErr_Clear();
      return py::none();
    }
    if (x.n_dims > 0 && x.strides == nullptr) return py::none();
    addresses.push_back(reinterpret_cast<int64_t>(x.data) + (int64_t)x.byte_offset);
    layouts.push_back((int64_t)x.device_type << 32 | x.device_id);
    layouts.push_back((int64_t)x.type_code << 40 | (int64_t)x.type_bits << 32 | x.n_dims);
    layouts.insert(layouts.end(), x.shape, x.shape + x.n_dims);
    layouts.insert(layouts.end(), x.strides, x.strides + x.n_dims);
  }
  return py::make_tuple(as_bytes(addresses), as_bytes(layouts));
}

}  // namespace spectral
