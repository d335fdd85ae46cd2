// The scalars of the penalty's gradient, for a matrix and for what is elementwise.
#pragma once

#include "scalar_math.h"
#include "simd.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

template <class S>
SPECTRAL_INLINE double strength_of(const Header& header, int64_t entry) {
  const double scale = header.scale == 0 ? 1 : (double)*reinterpret_cast<const S*>(header.scale);
  return scale * (double)reinterpret_cast<const S*>(header.strength)[entry];
}

// What s is multiplied by. At sigma = 0 there is no direction to move along: the gradient is zero.
template <class S>
SPECTRAL_INLINE double gradient_factor(const Header& header, int64_t matrix) {
  const double k = header.exponent;
  const double sigma = reinterpret_cast<const S*>(header.sigmas)[matrix];
  const double target = reinterpret_cast<const S*>(header.target)[matrix];
  if (sigma == 0) return 0;
  return strength_of<S>(header, matrix) * 2 * k * (power(sigma, k) - power(target, k)) *
         power(sigma, k - 1) / sigma;
}

// strength * dR/dx of the elements of a bias, shift or gain, at the norm in the state.
template <class S>
struct ElementwiseGradient {
  const double k, strength, shift_factor;
  const bool is_shift;

  ElementwiseGradient(const Header& header, const Elementwise& entry, int64_t index)
      : k(header.exponent),
        strength(strength_of<S>(header, header.n_matrices + index)),
        shift_factor(strength * 2 * k *
                     power((double)reinterpret_cast<const S*>(header.norm)[index], 2 * k - 2)),
        is_shift(entry.kind == kShift) {}

  SPECTRAL_INLINE S at(double x) const {
    const double magnitude = __builtin_fabs(x);
    return plain_nan((S)(is_shift ? shift_factor * x
                         : x == 0 ? 0
                                  : strength * 2 * k * (power(magnitude, k) - 1) *
                                        power(magnitude, k - 1) * (x > 0 ? 1 : -1)));
  }
};

}  // namespace
}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
