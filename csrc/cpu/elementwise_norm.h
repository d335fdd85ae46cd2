// Norm and penalty of a bias, shift or gain.
#pragma once

#include "scalar_math.h"
#include "simd.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

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
