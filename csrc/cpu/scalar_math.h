// The formulas, applied to the arrays of a header.
#pragma once

#include "../table.h"
#include "simd.h"

#define SPECTRAL_FORMULA SPECTRAL_INLINE
#include "../formulas.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

SPECTRAL_INLINE double inverse_power_of_two(double sigma) {
  return power_of_two(-binary_exponent(sigma));
}

template <class S>
SPECTRAL_INLINE bool takes_part(const Header& header, int64_t matrix) {
  return header.tolerance == 0 ||
         is_stale(header.tolerance, reinterpret_cast<const S*>(header.residuals)[matrix],
                  reinterpret_cast<const S*>(header.sigmas)[matrix]);
}

template <class S>
SPECTRAL_INLINE double strength_of(const Header& header, int64_t entry) {
  const double scale = header.scale == 0 ? 1 : (double)*reinterpret_cast<const S*>(header.scale);
  return scale * (double)reinterpret_cast<const S*>(header.strength)[entry];
}

SPECTRAL_INLINE const Operator* operator_of(const Header& header, int64_t matrix) {
  return header.operators == 0 ? nullptr
                               : reinterpret_cast<const Operator*>(header.operators) + matrix;
}

template <class S>
SPECTRAL_INLINE double gradient_factor(const Header& header, int64_t matrix) {
  return gradient_factor_of(reinterpret_cast<const S*>(header.sigmas)[matrix],
                            reinterpret_cast<const S*>(header.target)[matrix],
                            strength_of<S>(header, matrix), header.exponent, header.above != 0);
}

// Of singular value j.
template <class S>
SPECTRAL_INLINE double held_factor(const Header& header, int64_t matrix, int64_t constraint,
                                   int64_t j = 0) {
  return held_factor_of(reinterpret_cast<const S*>(header.sigmas)[j * header.n_matrices + matrix],
                        reinterpret_cast<const S*>(header.target)[matrix],
                        strength_of<S>(header, matrix), constraint, header.above != 0);
}

}  // namespace
}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
