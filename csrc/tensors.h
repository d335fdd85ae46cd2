// Addresses and layouts of Python's tensors, by DLPack's table of C functions: without torch
// headers, and many times faster than a Python call per tensor.
#pragma once

#include <pybind11/pybind11.h>

namespace spectral {

// Returns (addresses, layouts): bytes with one int64 per tensor, and bytes that are equal for equal
// devices, dtypes, shapes and strides. Returns None where the tensors' type does not offer the
// table, or one of them cannot be described.
pybind11::object describe(pybind11::handle type, const pybind11::list& tensors);

}  // namespace spectral
