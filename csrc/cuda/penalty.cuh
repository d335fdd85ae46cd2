// The penalty: the scalars of its gradient, and norm and penalty of a elementwise parameter.
#pragma once

#include "common.cuh"

namespace spectral {
namespace cuda {

__device__ __forceinline__ double strength_of(const Header& header, int64_t entry) {
  const double scale = header.scale == 0 ? 1 : (double)*at<const float>(header.scale);
  return scale * (double)at<const float>(header.strength)[entry];
}

// What s is multiplied by. At sigma = 0 there is no direction to move along: the gradient is zero.
__device__ __forceinline__ double gradient_factor(const Header& header, int64_t index,
                                                  double sigma) {
  const double k = header.exponent, target = at<const float>(header.target)[index];
  if (sigma == 0) return 0;
  return strength_of(header, index) * 2 * k * (power(sigma, k) - power(target, k)) *
         power(sigma, k - 1) / sigma;
}

// strength * dR/dx of the elements of a bias, shift or gain, at the norm in the state.
struct ElementwiseGradient {
  double k, strength, shift_factor;  // strength times 2 k
  bool is_shift;

  __device__ __forceinline__ ElementwiseGradient(const Header& header, const Elementwise& entry,
                                                 int64_t index)
      : k(header.exponent),
        strength(strength_of(header, header.n_matrices + index) * 2 * k),
        shift_factor(strength * power(at<const float>(header.norm)[index], 2 * k - 2)),
        is_shift(entry.kind == kShift) {}

  __device__ __forceinline__ float of(double x) const {
    if (is_shift) return (float)(shift_factor * x);
    const double magnitude = fabs(x);
    if (x == 0) return 0;
    return (float)(strength * (power(magnitude, k) - 1) * power(magnitude, k - 1) *
                   (x > 0 ? 1 : -1));
  }
};

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
