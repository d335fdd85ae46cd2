// The formulas, applied to the arrays of a header; norms of elementwise parameters.
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

template <class S>
SPECTRAL_INLINE double gradient_factor(const Header& header, int64_t matrix) {
  return gradient_factor_of(reinterpret_cast<const S*>(header.sigmas)[matrix],
                            reinterpret_cast<const S*>(header.target)[matrix],
                            strength_of<S>(header, matrix), header.exponent);
}

// The gradient of an elementwise parameter at the norm in the state.
template <class S>
SPECTRAL_INLINE ElementwiseGradient elementwise_gradient_of(const Header& header,
                                                            const Elementwise& entry,
                                                            int64_t index) {
  return ElementwiseGradient(header.exponent, strength_of<S>(header, header.n_matrices + index),
                             reinterpret_cast<const S*>(header.norm)[index], entry.kind == kShift);
}

// Norm and raw penalty of a bias, shift or gain.
template <class T, class S = typename Simd<T>::Accumulator>
void elementwise_norm_of(const Header& header, int64_t index) {
  const Elementwise& entry = reinterpret_cast<const Elementwise*>(header.elementwise)[index];
  const T* x = reinterpret_cast<const T*>(entry.weight);
  const double k = header.exponent;
  double squares = 0, gains = 0;
  for (int64_t i = 0; i < entry.size; i += Simd<T>::kLanes) {
    const int64_t left = entry.size - i;
    const auto lanes = left >= Simd<T>::kLanes ? Simd<T>::load(x + i) : load_part(x + i, left);
    for (int j = 0; j < Simd<T>::kLanes; ++j) squares += (double)lanes[j] * (double)lanes[j];
    if (entry.kind == kGain)
      for (int64_t j = 0; j < Simd<T>::kLanes && j < left; ++j) {
        const double excess = power(__builtin_fabs(lanes[j]), k) - 1;
        gains += excess * excess;
      }
  }
  reinterpret_cast<S*>(header.norm)[index] = (S)__builtin_sqrt(squares);
  reinterpret_cast<S*>(header.raw_penalty)[header.n_matrices + index] =
      (S)(entry.kind == kGain ? gains : power(squares, k));
}

}  // namespace
}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
