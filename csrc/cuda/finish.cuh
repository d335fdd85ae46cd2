// Residual and penalty of a matrix, with one vector and with several.
#pragma once

#include "common.cuh"

namespace spectral {
namespace cuda {

// ||W^T u - sigma v||^2 = ||W^T u||^2 - sigma^2; t was made with s * 2^-e.
__device__ __forceinline__ double residual_of(double sigma, double t_norm, int e) {
  if (!isfinite(sigma) || !(sigma > 0)) return sigma;
  const double wtu = t_norm / (power_of_two(-e) * sigma);
  const double squared = (wtu - sigma) * (wtu + sigma);
  return squared > 0 ? sqrt(squared) : squared <= 0 ? 0 : squared;
}

__device__ __forceinline__ void put_penalty(const Header& header, int64_t index, double sigma) {
  const double target = at<const float>(header.target)[index];
  const double excess = power(sigma, header.exponent) - power(target, header.exponent);
  at<float>(header.raw_penalty)[index] = (float)(excess * excess);
}

}  // namespace cuda
}  // namespace spectral
