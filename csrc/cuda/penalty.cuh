// The scalars of the penalty's gradient.
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
                            strength_of(header, index), header.exponent, header.above != 0);
}

// Of singular value j.
__device__ __forceinline__ double held_factor(const Header& header, int64_t index,
                                              int64_t constraint, int64_t j = 0) {
  return held_factor_of(at<const float>(header.sigmas)[j * header.n_matrices + index],
                        at<const float>(header.target)[index], strength_of(header, index),
                        constraint, header.above != 0);
}

}  // namespace cuda
}  // namespace spectral
