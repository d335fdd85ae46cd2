#include "guard.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace spectral {

// The parts of `objects`, borrowed.
struct Guard::Objects {
  PyObject* parts[8];

  explicit Objects(const py::tuple& objects) {
    if (objects.size() != 8)
      throw py::type_error("objects: expected eight tuples, got " + std::to_string(objects.size()));
    for (int i = 0; i < 8; ++i) {
      parts[i] = PyTuple_GET_ITEM(objects.ptr(), i);
      if (!PyTuple_Check(parts[i]))
        throw py::type_error("objects: expected eight tuples, got another type at " +
                             std::to_string(i));
    }
  }

  PyObject* lookups() const { return parts[0]; }   // dict, key, value, ...
  PyObject* lists() const { return parts[1]; }     // list, tuple of its items, ...
  PyObject* mappings() const { return parts[2]; }  // dict, its keys, its values, ...
  PyObject* tensors() const { return parts[3]; }
  PyObject* holders() const { return parts[4]; }  // of gradients
  PyObject* options() const { return parts[5]; }  // dict, key, ...
  PyObject* versioned() const { return parts[6]; }
  PyObject* edited() const { return parts[7]; }
};

namespace {

constexpr double kLong = 100e3;  // ns; for longer ones other threads of Python may run

PyObject* item(PyObject* tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple, i); }

// Returns an attribute of `object` by the descriptor in its class.
py::object attribute(PyObject* object, const py::object& descriptor) {
  py::object found = py::reinterpret_steal<py::object>(
      Py_TYPE(descriptor.ptr())
          ->tp_descr_get(descriptor.ptr(), object, (PyObject*)Py_TYPE(object)));
  if (!found) throw py::error_already_set();
  return found;
}

// Returns the value of `key`, borrowed, or null.
PyObject* value_of(PyObject* dict, PyObject* key) {
  if (!PyDict_Check(dict)) return nullptr;
  PyObject* found = PyDict_GetItemWithError(dict, key);
  if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

// Writes the number `object` to `found`; false if it is not one of Python's own.
bool number(PyObject* object, double& found) {
  if (object == nullptr) return false;
  if (PyFloat_CheckExact(object)) {
    found = PyFloat_AS_DOUBLE(object);
    return true;
  }
  if (!PyLong_Check(object)) return false;
  found = PyLong_AsDouble(object);
  if (found == -1 && PyErr_Occurred()) throw py::error_already_set();
  return true;
}

// See cpu::run.
bool run_one(const cpu::Job& job, int threads) {
  const double time = cpu::expected_time(job);
  if (time < kLong) return cpu::run(job, time, threads);
  py::gil_scoped_release unlocked;
  return cpu::run(job, time, threads);
}

}  // namespace

Guard::Guard(const TensorReader& reader, const py::tuple& objects, std::vector<int> grads,
             int64_t n_written, bool edits_grads, std::vector<GradColumn> columns,
             std::vector<int64_t> counters, std::vector<Option> options, std::vector<cpu::Job> jobs,
             py::object increment_version, py::object is_inference)
    : reader_(&reader),
      wanted_(std::move(grads)),
      n_written_(n_written),
      edits_grads_(edits_grads),
      columns_(std::move(columns)),
      counters_(std::move(counters)),
      options_(std::move(options)),
      jobs_(std::move(jobs)),
      increment_version_(std::move(increment_version)),
      is_inference_(std::move(is_inference)) {
  const Objects own(objects);
  if (wanted_.size() != (size_t)PyTuple_GET_SIZE(own.holders()))
    throw std::invalid_argument("grads: expected one number per holder, got " +
                                std::to_string(wanted_.size()));
  if (2 * options_.size() != (size_t)PyTuple_GET_SIZE(own.options()))
    throw std::invalid_argument("options: expected one Option per dict and key, got " +
                                std::to_string(options_.size()));
  const py::handle type = reader_->type();
  grad_ = type.attr("grad");
  requires_grad_of_ = type.attr("requires_grad");
  version_ = type.attr("_version");
  for (const py::object& own : {grad_, requires_grad_of_, version_})
    if (Py_TYPE(own.ptr())->tp_descr_get == nullptr)
      throw std::invalid_argument("reader: expected descriptors in torch.Tensor, got others");
  for (const py::handle holder : py::reinterpret_borrow<py::tuple>(own.holders())) {
    const py::object kind = py::type::of(holder);
    const py::object grad = kind.attr("grad"), requires_grad = kind.attr("requires_grad");
    if (!grad.is(grad_) || !requires_grad.is(requires_grad_of_))
      throw std::invalid_argument("objects: expected the attributes of torch.Tensor, got others");
  }
  for (const GradColumn& column : columns_) {
    const int64_t* refs = reinterpret_cast<const int64_t*>(column.refs);
    for (int64_t i = 0; i < column.n_rows; ++i)
      if (column.first + refs[i] < 0 || column.first + refs[i] >= (int64_t)wanted_.size())
        throw std::invalid_argument("columns: expected a gradient below " +
                                    std::to_string(wanted_.size()) + ", got " +
                                    std::to_string(column.first + refs[i]));
  }
  std::vector<double> values;
  if (!is_same(own) || !read(own, true) || !read_versions(own, true) || !read_options(own, values))
    throw std::invalid_argument("objects: they have changed, or cannot be read");
  for (const int64_t counter : counters_)
    counts_.push_back(*reinterpret_cast<const int64_t*>(counter));
  grads_placed_ = grads_now_;
  grads_ = py::list();
}

Guard::Found Guard::compared(const Objects& objects) {
  for (size_t i = 0; i < counters_.size(); ++i)
    if (*reinterpret_cast<const int64_t*>(counters_[i]) != counts_[i]) return kChanged;
  if (!is_same(objects) || !read(objects, false) || !read_versions(objects, false)) return kChanged;
  return is_missing_ ? kMissing : kFits;
}

bool Guard::is_same(const Objects& objects) const {
  PyObject* const lookups = objects.lookups();
  for (Py_ssize_t i = 0; i + 2 < PyTuple_GET_SIZE(lookups); i += 3)
    if (value_of(item(lookups, i), item(lookups, i + 1)) != item(lookups, i + 2)) return false;
  PyObject* const lists = objects.lists();
  for (Py_ssize_t i = 0; i + 1 < PyTuple_GET_SIZE(lists); i += 2) {
    PyObject *const list = item(lists, i), *const items = item(lists, i + 1);
    if (!PyList_Check(list) || PyList_GET_SIZE(list) != PyTuple_GET_SIZE(items)) return false;
    for (Py_ssize_t j = 0; j < PyTuple_GET_SIZE(items); ++j)
      if (PyList_GET_ITEM(list, j) != item(items, j)) return false;
  }
  PyObject* const mappings = objects.mappings();
  for (Py_ssize_t i = 0; i + 2 < PyTuple_GET_SIZE(mappings); i += 3) {
    PyObject *const dict = item(mappings, i), *const keys = item(mappings, i + 1);
    if (!PyDict_Check(dict) || PyDict_GET_SIZE(dict) != PyTuple_GET_SIZE(keys)) return false;
    PyObject *key, *value;
    Py_ssize_t place = 0;
    for (Py_ssize_t j = 0; PyDict_Next(dict, &place, &key, &value); ++j)
      if (key != item(keys, j) || value != item(item(mappings, i + 2), j)) return false;
  }
  return true;
}

// Reads one tensor, and compares it with the one in its place before.
bool Guard::read_tensor(py::handle tensor, bool is_written, int64_t& address, bool is_first) {
  TensorFacts found;
  const bool can_be_read =
      reader_->is_plain(tensor) ? reader_->read_plain(tensor, found) : reader_->read(tensor, found);
  if (!can_be_read || found.is_freed || found.is_negative) return false;
  if (is_first && reader_->is_plain(tensor)) {
    TensorFacts other;
    if (!reader_->read(tensor, other) || other.span.begin != found.span.begin ||
        other.span.end != found.span.end || other.n_dims != found.n_dims)
      return false;
  }
  const int64_t n = found.n_dims, head[] = {found.device, found.type, n};
  if (is_first) {
    append_layout(found, layouts_);
  } else {
    const int64_t* const before = layouts_.data() + in_layouts_;
    if (!std::equal(head, head + 3, before) ||
        !std::equal(found.shape, found.shape + n, before + 3) ||
        !std::equal(found.strides, found.strides + n, before + 3 + n))
      return false;
  }
  in_layouts_ += 3 + 2 * n;
  address = found.span.begin;
  if (is_written) spans_.push_back(found.span);
  return true;
}

bool Guard::read(const Objects& objects, bool is_first) {
  in_layouts_ = 0;
  is_missing_ = false;
  spans_.clear();
  PyObject *const tensors = objects.tensors(), *const holders = objects.holders();
  const int64_t n_tensors = PyTuple_GET_SIZE(tensors), n_holders = PyTuple_GET_SIZE(holders);
  if (is_first) {
    addresses_.resize(n_tensors);
    grads_now_.assign(n_holders, 0);
    requires_grad_.resize(n_holders);
  }
  grads_ = py::list();
  for (int64_t i = 0; i < n_tensors; ++i) {
    int64_t now = 0;
    if (!read_tensor(item(tensors, i), i < n_written_, now, is_first)) return false;
    if (!is_first && now != addresses_[i]) return false;
    addresses_[i] = now;
  }
  for (int64_t i = 0; i < n_holders; ++i) {
    PyObject* const holder = item(holders, i);
    const bool is_free = attribute(holder, requires_grad_of_).ptr() == Py_True;
    if (!is_first && is_free != (bool)requires_grad_[i]) return false;
    requires_grad_[i] = is_free;
    if (wanted_[i] == kIgnored) continue;
    const py::object grad = attribute(holder, grad_);
    if (grad.is_none() && wanted_[i] == kTensor) {
      if (is_first) return false;
      is_missing_ = true;
      in_layouts_ += 3 + 2 * layouts_[in_layouts_ + 2];
      continue;
    }
    if (grad.is_none()) continue;
    if (wanted_[i] == kNone) return false;
    if (!read_tensor(grad, true, grads_now_[i], is_first)) return false;
    grads_.append(grad);
  }
  if (is_missing_ || (!is_first && grads_now_ == grads_placed_))
    return true;  // nothing overlaps, as before
  if (order_.size() != spans_.size()) {
    order_.resize(spans_.size());
    std::iota(order_.begin(), order_.end(), 0);
  }
  return overlap(spans_, spans_.size(), order_).first < 0;
}

bool Guard::read_versions(const Objects& objects, bool is_first) {
  PyObject* const tensors = objects.versioned();
  versions_.resize(PyTuple_GET_SIZE(tensors));
  for (size_t i = 0; i < versions_.size(); ++i) {
    const py::object version = attribute(item(tensors, i), version_);
    const int64_t now = PyLong_AsLongLong(version.ptr());
    if (now == -1 && PyErr_Occurred()) throw py::error_already_set();
    if (!is_first && now != versions_[i]) return false;
    versions_[i] = now;
  }
  return true;
}

bool Guard::read_options(const Objects& objects, std::vector<double>& found) const {
  PyObject* const options = objects.options();
  found.resize(options_.size());
  for (size_t i = 0; i < options_.size(); ++i) {
    const Option& option = options_[i];
    PyObject* value = value_of(item(options, 2 * i), item(options, 2 * i + 1));
    if (option.index >= 0) {
      if (value == nullptr || !PyTuple_CheckExact(value)) return false;
      value = option.index < PyTuple_GET_SIZE(value) ? item(value, option.index) : nullptr;
    }
    if (!number(value, found[i])) return false;
    if (option.is_fixed && found[i] != *reinterpret_cast<const double*>(option.address))
      return false;
  }
  return true;
}

void Guard::place_grads() {
  if (grads_now_ == grads_placed_) return;
  for (const GradColumn& column : columns_) {
    place_rows(grads_now_.data() + column.first, column.table, column.n_rows, column.row_bytes,
               column.refs, column.offsets);
  }
  for (size_t i = 0; i < counters_.size(); ++i)
    counts_[i] = ++*reinterpret_cast<int64_t*>(counters_[i]);
  grads_placed_ = grads_now_;
}

int64_t Guard::look(const py::tuple& objects) {
  const Objects own(objects);
  const Found found = compared(own);
  if (found == kFits) place_grads();
  grads_ = py::list();
  return found;
}

int64_t Guard::step(const py::tuple& objects, int threads) {
  const Objects own(objects);
  std::vector<double> values;
  if (is_inference_().ptr() != Py_False || !read_options(own, values)) return kChanged;
  const Found found = compared(own);
  const py::list grads = std::exchange(grads_, py::list());  // alive until the step is done
  if (found != kFits) return found;
  place_grads();
  for (size_t i = 0; i < options_.size(); ++i)
    *reinterpret_cast<double*>(options_[i].address) = values[i];
  const auto count_edits = [&] {
    increment_version_(edits_grads_ ? py::handle(grads) : py::handle(own.edited()));
    read_versions(own, true);
  };
  for (size_t i = 0; i < jobs_.size(); ++i) {
    try {
      if (run_one(jobs_[i], threads)) return (int64_t)i;
    } catch (...) {  // no memory for this one; those before it are done
      if (i > 0) count_edits();
      throw;
    }
  }
  count_edits();
  return kFits;
}

}  // namespace spectral
