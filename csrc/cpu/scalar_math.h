// Scalar formulas shared by the kernels of one instruction-set level.
#pragma once

#include "../table.h"
#include "simd.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

SPECTRAL_INLINE double power(double x, double k) {
  if (k == 2) return x * x;
  if (k == 1) return x;
  return __builtin_pow(x, k);
}

// 2^-e for sigma = m * 2^e. s is multiplied by it before it goes into t, so that t neither
// overflows nor vanishes; a power of two changes no digit of the result.
SPECTRAL_INLINE double inverse_power_of_two(double sigma) {
  if (!(sigma > 0) || !is_finite(sigma)) return 1;
  uint64_t bits;
  __builtin_memcpy(&bits, &sigma, 8);
  const int64_t exponent = (int64_t)(bits >> 52) - 1023;
  if (exponent <= -1022 || exponent >= 1022) return 1;
  bits = (uint64_t)(1023 - exponent) << 52;
  double scale;
  __builtin_memcpy(&scale, &bits, 8);
  return scale;
}

// Tells whether a call is about a matrix; see Header.tolerance.
template <class S>
SPECTRAL_INLINE bool takes_part(const Header& header, int64_t matrix) {
  return header.tolerance == 0 ||
         reinterpret_cast<const S*>(header.residuals)[matrix] >
             header.tolerance * (double)reinterpret_cast<const S*>(header.sigmas)[matrix];
}

}  // namespace
}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
