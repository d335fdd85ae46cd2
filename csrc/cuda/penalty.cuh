// The scalars of the penalty's gradient, and norm and penalty of an elementwise parameter.
#pragma once

#include "common.cuh"

namespace spectral {
namespace cuda {

__device__ __forceinline__ double strength_of(const Header& header, int64_t entry) {
  const double scale = header.scale == 0 ? 1 : (double)*at<const float>(header.scale);
  return scale * (double)at<const float>(header.strength)[entry];
}

__device__ __forceinline__ double gradient_factor(const Header& header, int64_t index,
                                                  double sigma) {
  return gradient_factor_of(sigma, at<const float>(header.target)[index],
                            strength_of(header, index), header.exponent);
}

// The gradient of an elementwise parameter at the norm in the state.
__device__ __forceinline__ ElementwiseGradient elementwise_gradient_of(const Header& header,
                                                                       const Elementwise& entry,
                                                                       int64_t index) {
  return ElementwiseGradient(header.exponent, strength_of(header, header.n_matrices + index),
                             at<const float>(header.norm)[index], entry.kind == kShift);
}

template <class T>
__device__ __forceinline__ void elementwise_norm(const Header& header, int64_t index) {
  const Elementwise entry = at<const Elementwise>(header.elementwise)[index];
  const T* x = at<const T>(entry.weight);
  const double k = header.exponent;
  double squares = 0, gains = 0;
  for (int64_t i = threadIdx.x; i < entry.size; i += kThreads) {
    const double value = to_float(x[i]);
    squares += value * value;
    if (entry.kind == kGain) {
      const double excess = power(fabs(value), k) - 1;
      gains += excess * excess;
    }
  }
  squares = sum_over_block(squares);
  gains = sum_over_block(gains);
  if (threadIdx.x > 0) return;
  at<float>(header.norm)[index] = (float)sqrt(squares);
  at<float>(header.raw_penalty)[header.n_matrices + index] =
      (float)(entry.kind == kGain ? gains : power(squares, k));
}

}  // namespace cuda
}  // namespace spectral
