// Where Python's tensors lie, asked through DLPack's table of C functions: no torch headers, and a
// fraction of what the same questions cost one Python call at a time.
#pragma once

#include <pybind11/pybind11.h>

namespace spectral {

// Returns (addresses, layouts): bytes with one int64 per tensor, and bytes that are equal for equal
// devices, dtypes, shapes and strides. Returns None where the tensors' type does not offer the
// table, or one of them cannot be described.
pybind11::object describe(pybind11::handle type, const pybind11::list& tensors);

}  // namespace spectral
