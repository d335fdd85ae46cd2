// Launches for several vectors per matrix.
#pragma once

#include <stdint.h>

#include "../table.h"

namespace spectral {
namespace cuda {

// S = V W^T, T = S W and the products of S of every tile; norm and penalty of every elementwise
// parameter. what: the caller, for errors; the device is current.
void subspace_products(const char* what, const Header& header, int64_t stream);

// sigma, residual and v_next of every matrix, whose v and s become those of the Ritz values.
void ritz(const char* what, const Header& header, int64_t stream);

}  // namespace cuda
}  // namespace spectral
