// The CUDA backend: two launches per step over all matrices and elementwise parameters of a table,
// three where matrices have several vectors.
//
// The header itself is read on the host. Every address in it is one on the device, the tables'
// too; state arrays and scale are float32. A call puts its launch into the stream (a cudaStream_t
// as a number) and returns: it neither allocates nor waits, so that a CUDA graph can
// capture it. Empty work is not launched.
//
// Throws std::invalid_argument for weights that are neither float32, bfloat16 nor float16, and
// std::runtime_error with CUDA's message where a launch fails.
#pragma once

#include <string>

#include "../table.h"

namespace spectral {
namespace cuda {

// Returns CUDA's message why the kernels cannot run on a device; empty: they can.
std::string problem(int device);

// s, partial t and the products of s of every tile; norm and penalty of every elementwise
// parameter.
void gram_matvec(const Header& header, int device, int64_t stream);

// Partial t and products of every tile from a given s.
void transposed(const Header& header, int device, int64_t stream);

// Sums of these over the tiles of every matrix: t [sum of r N], at an address that may be 0, laid
// out like v; gram [n_matrices, r, r] of float64. Zeros where a matrix has no rows or columns.
void collect(const Header& header, int64_t t, int64_t gram, int device, int64_t stream);

// finish: sigma, penalty, residual and v_next of every matrix, and several vectors turned.
// gradient: the penalty's gradient, added to grad or written over it; with finish it uses the new
// sigma, else the one in the state.
void rank_one(const Header& header, int device, int64_t stream, bool finish, bool gradient,
              bool accumulate);

// An optimizer's step that contains the penalty's gradient at v and the sigma, s and norms in the
// state; then s, partial t and products of the new weights with v_next, norms and penalties of the
// new elementwise parameters. A step that found_inf skips takes the products with v and copies it
// to v_next. The update itself is read on the host; every address in it is one on the device.
void update(const Header& header, const Update& update, int device, int64_t stream);

}  // namespace cuda
}  // namespace spectral
