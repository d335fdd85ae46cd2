#include "tensors.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
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

py::bytes as_bytes(const std::vector<int64_t>& numbers) {
  return py::bytes(reinterpret_cast<const char*>(numbers.data()), 8 * numbers.size());
}

// Returns how many elements lie between the first and the last one, both included.
int64_t extent(const int64_t* shape, const int64_t* strides, int32_t n_dims) {
  int64_t n = 1;
  for (int32_t d = 0; d < n_dims; ++d) {
    if (shape[d] == 0) return 0;
    n += (shape[d] - 1) * strides[d];
  }
  return n;
}

}  // namespace

struct DLPackExchangeApi {
  uint32_t major, minor;
  DLPackExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*dltensor_from_py_object)(void* object, DLTensor* out);  // may be null
  void* current_work_stream;
};

TensorReader::TensorReader(const py::tuple& types, const std::vector<int64_t>& functions,
                           int64_t impl_offset)
    : type_(types[0]),
      parameter_(types[1]),
      impl_(type_.attr("_cdata")),
      is_neg_(type_.attr("is_neg")),
      api_(nullptr),
      impl_offset_(impl_offset) {
  if (functions.size() * sizeof(int64_t) != sizeof(torch_))
    throw std::invalid_argument("functions: expected one address per function, got " +
                                std::to_string(functions.size()));
  std::memcpy(&torch_, functions.data(), sizeof(torch_));
  const py::object capsule = py::getattr(type_, "__dlpack_c_exchange_api__", py::none());
  if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
    api_ = static_cast<const DLPackExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (api_ != nullptr && api_->major > 1) api_ = api_->previous;
  }
  if (api_ == nullptr || api_->major != 1 || api_->dltensor_from_py_object == nullptr)
    throw std::invalid_argument("type: expected a DLPack exchange table of version 1, got none");
  if (Py_TYPE(impl_.ptr())->tp_descr_get == nullptr || !PyCallable_Check(is_neg_.ptr()))
    throw std::invalid_argument("type: expected _cdata and is_neg of torch.Tensor, got others");
}

void append_layout(const TensorFacts& facts, std::vector<int64_t>& layouts) {
  layouts.insert(layouts.end(), {facts.device, facts.type, facts.n_dims});
  layouts.insert(layouts.end(), facts.shape, facts.shape + facts.n_dims);
  layouts.insert(layouts.end(), facts.strides, facts.strides + facts.n_dims);
}

std::pair<int64_t, int64_t> overlap(const std::vector<Span>& spans, size_t n_written,
                                    std::vector<uint32_t>& order) {
  const auto is_before = [&](uint32_t a, uint32_t b) { return spans[a].begin < spans[b].begin; };
  if (!std::is_sorted(order.begin(), order.end(), is_before))
    std::sort(order.begin(), order.end(), is_before);
  const Span none{0, 0};
  const Span *any = &none, *written = &none;  // those that reach farthest so far
  for (const uint32_t i : order) {
    const Span& now = spans[i];
    if (now.begin == now.end) continue;
    const Span* const before = i < n_written ? any : written;
    if (now.begin < before->end) return {before - spans.data(), i};
    if (now.end > any->end) any = &now;
    if (i < n_written && now.end > written->end) written = &now;
  }
  return {-1, -1};
}

bool TensorReader::read(py::handle tensor, TensorFacts& found) const {
  DLTensor x{};
  if (!PyObject_TypeCheck(tensor.ptr(), (PyTypeObject*)type_.ptr())) return false;
  if (api_->dltensor_from_py_object(tensor.ptr(), &x) != 0) {
    PyErr_Clear();
    return false;
  }
  if (x.n_dims > 0 && x.strides == nullptr) return false;
  found.device = (int64_t)x.device_type << 32 | x.device_id;
  found.type = (int64_t)x.type_code << 32 | x.type_bits;
  found.n_dims = x.n_dims;
  found.shape = x.shape;
  found.strides = x.strides;

  // A handle of torch's C functions points at an at::Tensor, which is one pointer.
  const py::object number = py::reinterpret_steal<py::object>(
      Py_TYPE(impl_.ptr())->tp_descr_get(impl_.ptr(), tensor.ptr(), type_.ptr()));
  if (!number) throw py::error_already_set();
  void* impl = PyLong_AsVoidPtr(number.ptr());
  int64_t storage_bytes = 0, offset = 0;
  if (torch_.storage_size(&impl, &storage_bytes) != 0 || torch_.storage_offset(&impl, &offset) != 0)
    return false;
  const int64_t address = reinterpret_cast<int64_t>(x.data) + (int64_t)x.byte_offset;
  place_in_storage(tensor, address, x.type_bits / 8, offset, storage_bytes, found);
  return true;
}

void TensorReader::place_in_storage(py::handle tensor, int64_t address, int64_t size,
                                    int64_t offset, int64_t storage_bytes,
                                    TensorFacts& found) const {
  const int64_t bytes = extent(found.shape, found.strides, found.n_dims) * size;
  found.span = {address, address + bytes};
  const bool is_behind = address != offset * size && offset * size + bytes <= storage_bytes;
  found.is_freed = bytes != 0 && !is_behind;
  const py::object negative =
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg_.ptr(), tensor.ptr()));
  if (!negative) throw py::error_already_set();
  found.is_negative = negative.ptr() == Py_True;
}

bool TensorReader::read_plain(py::handle tensor, TensorFacts& found) const {
  void* impl = *reinterpret_cast<void**>(reinterpret_cast<char*>(tensor.ptr()) + impl_offset_);
  constexpr int32_t kStrided = 0, kHalf = 5, kFloat = 6, kDouble = 7, kBFloat16 = 15;  // torch's
  int32_t layout = 0, dtype = 0, device_type = 0, device_index = 0;
  if (impl == nullptr || torch_.layout(&impl, &layout) != 0 || layout != kStrided) return false;
  void* data = nullptr;
  int64_t n_dims = 0, storage_bytes = 0, offset = 0, *shape = nullptr, *strides = nullptr;
  if (torch_.data_ptr(&impl, &data) != 0 || torch_.dim(&impl, &n_dims) != 0 ||
      torch_.sizes(&impl, &shape) != 0 || torch_.strides(&impl, &strides) != 0 ||
      torch_.dtype(&impl, &dtype) != 0 || torch_.device_type(&impl, &device_type) != 0 ||
      torch_.device_index(&impl, &device_index) != 0 ||
      torch_.storage_size(&impl, &storage_bytes) != 0 || torch_.storage_offset(&impl, &offset) != 0)
    return false;
  const int64_t size = dtype == kFloat                        ? 4
                       : dtype == kDouble                     ? 8
                       : dtype == kHalf || dtype == kBFloat16 ? 2
                                                              : 0;
  if (size == 0) return false;
  found.device = (int64_t)device_type << 32 | (uint32_t)device_index;
  found.type = dtype;
  found.n_dims = (int32_t)n_dims;
  found.shape = shape;
  found.strides = strides;
  place_in_storage(tensor, reinterpret_cast<int64_t>(data), size, offset, storage_bytes, found);
  return true;
}

py::object TensorReader::look(const py::list& written, const py::list& read_only) const {
  const size_t n_written = written.size(), n = n_written + read_only.size();
  std::vector<int64_t> addresses[2], layouts[2];
  std::vector<Span> spans;
  spans.reserve(n);
  py::object problem = py::none();
  for (size_t i = 0; i < n; ++i) {
    const bool is_read = i >= n_written;
    const py::handle tensor = is_read ? PyList_GET_ITEM(read_only.ptr(), i - n_written)
                                      : PyList_GET_ITEM(written.ptr(), i);
    std::vector<int64_t>& own = layouts[is_read];
    if (tensor.is_none()) {
      addresses[is_read].push_back(0);
      own.push_back(-1);
      spans.push_back({0, 0});
      continue;
    }
    TensorFacts found;
    if (!read(tensor, found)) return py::none();
    addresses[is_read].push_back(found.span.begin);
    append_layout(found, own);
    spans.push_back(found.span);
    if (problem.is_none() && (found.is_freed || found.is_negative))
      problem = py::make_tuple(found.is_freed ? "freed" : "negative", i, i);
  }
  if (n_written != 0 && problem.is_none()) {
    std::vector<uint32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    const auto [first, second] = overlap(spans, n_written, order);
    if (first >= 0) problem = py::make_tuple("overlap", first, second);
  }
  return py::make_tuple(as_bytes(addresses[0]), as_bytes(layouts[0]), as_bytes(addresses[1]),
                        as_bytes(layouts[1]), problem);
}

py::list entries(const py::list& dicts, const py::tuple& keys) {
  py::list found(dicts.size() * keys.size());
  size_t place = 0;
  for (const py::handle dict : dicts)
    for (const py::handle key : keys) {
      if (!PyDict_Check(dict.ptr()))
        throw py::type_error("dicts: expected a list of dicts, got others");
      PyObject* value = PyDict_GetItemWithError(dict.ptr(), key.ptr());
      if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
      found[place++] = value == nullptr ? py::handle(Py_None) : py::handle(value);
    }
  return found;
}

void place_rows(const int64_t* addresses, int64_t table, int64_t n_rows, int64_t row_bytes,
                int64_t refs, int64_t offsets) {
  const int64_t* const ref = reinterpret_cast<const int64_t*>(refs);
  const int64_t* const offset = reinterpret_cast<const int64_t*>(offsets);
  for (int64_t i = 0; i < n_rows; ++i) {
    const int64_t address = addresses[ref[i]];
    *reinterpret_cast<int64_t*>(table + i * row_bytes) = address == 0 ? 0 : address + offset[i];
  }
}

void place(const py::bytes& addresses, int64_t table, int64_t n_rows, int64_t row_bytes,
           int64_t refs, int64_t offsets) {
  const int64_t* const found = reinterpret_cast<const int64_t*>(PyBytes_AS_STRING(addresses.ptr()));
  const int64_t n = PyBytes_GET_SIZE(addresses.ptr()) / 8;
  const int64_t* const ref = reinterpret_cast<const int64_t*>(refs);
  for (int64_t i = 0; i < n_rows; ++i)
    if (ref[i] < 0 || ref[i] >= n)
      throw std::out_of_range("refs: expected a tensor below " + std::to_string(n) + ", got " +
                              std::to_string(ref[i]) + " in row " + std::to_string(i));
  place_rows(found, table, n_rows, row_bytes, refs, offsets);
}

}  // namespace spectral
