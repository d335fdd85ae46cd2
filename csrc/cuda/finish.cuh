// What finishing a matrix takes with one vector and with several. A block finishes a matrix.
#pragma once

#include "common.cuh"

namespace spectral {
namespace cuda {

constexpr int kColumnsAhead = 4;  // whose loads a thread has under way

// Tells whether the call is about the matrix; with a tolerance, v then becomes v_next. Every thread
// must call it before any writes sigma or residual.
__device__ __forceinline__ bool begins(const Header& header, const Matrix& m, int64_t index) {
  if (header.tolerance == 0) return true;
  if (!takes_part(header, index)) return false;
  float* v = at<float>(header.v) + m.v_offset;
  const float* v_next = at<const float>(header.v_next) + m.v_offset;
  for (int64_t c = threadIdx.x; c < header.r * m.outer * m.inner; c += kThreads) v[c] = v_next[c];
  __syncthreads();
  return true;
}

// to = sum of the n numbers of t over the tiles; returns the sum of its squares. A matrix's partial
// sums lie one after the other. Ends with a barrier.
__device__ __forceinline__ double reduce_tiles(const Header& header, const Matrix& m, int64_t n,
                                               float* to) {
  const float* t = at<const float>(header.t_partial);
  if (m.n_tiles > 0) t += at<const Tile>(header.tiles)[m.first_tile].t_offset;
  double squares = 0;
  for (int64_t c = threadIdx.x; c < n; c += kColumnsAhead * kThreads) {
    float sum[kColumnsAhead] = {};
#pragma unroll 8
    for (int64_t i = 0; i < m.n_tiles; ++i)
#pragma unroll
      for (int j = 0; j < kColumnsAhead; ++j)
        if (c + j * kThreads < n) sum[j] += t[i * n + c + j * kThreads];
#pragma unroll
    for (int j = 0; j < kColumnsAhead; ++j) {
      squares += (double)sum[j] * (double)sum[j];
      if (c + j * kThreads < n) to[c + j * kThreads] = sum[j];
    }
  }
  return sum_over_block(squares);
}

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
  at<float>(header.penalty)[index] = (float)(excess * excess);
}

}  // namespace cuda
}  // namespace spectral
