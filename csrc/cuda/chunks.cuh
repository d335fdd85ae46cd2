// Sums over the tiles of a matrix that has one vector, as a block makes them. The tiles may be
// thousands: a block takes a chunk of the columns, so that many of them share a matrix.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace spectral {
namespace cuda {

// Of s, over all tiles of a matrix; the same bits in every thread of every block. Every thread must
// call it.
__device__ __forceinline__ double sum_of_squares(const Header& header, const Matrix& m) {
  const double* partial = at<const double>(header.gram_partial) + m.first_tile;
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < m.n_tiles; i += kThreads) sum += partial[i];
  return sum_over_block(sum);
}

// Adds every kWarps-th t, of n numbers each, to the sums of a thread: of four neighbouring columns,
// or of each 32nd where these are not aligned.
template <int kWidth>
__device__ __forceinline__ void add_tiles(const float* t, int64_t n, int64_t n_tiles, int count,
                                          float (&sum)[kChunkColumns]) {
  using Bits = std::conditional_t<kWidth == 1, float, uint4>;
  constexpr int kTilesAhead = 8;  // whose loads are in flight per thread
  constexpr int kPieces = kChunkColumns / (32 * kWidth);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float own[kPieces][kWidth] = {};
  for (int64_t first = warp; first < n_tiles; first += kTilesAhead * kWarps) {
    Bits bits[kTilesAhead][kPieces] = {};
#pragma unroll
    for (int i = 0; i < kTilesAhead; ++i)
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int64_t tile = first + i * kWarps;
        const int c = (lane + 32 * j) * kWidth;
        if (tile < n_tiles && c < count)
          bits[i][j] = __ldcg(reinterpret_cast<const Bits*>(t + tile * n + c));
      }
#pragma unroll
    for (int i = 0; i < kTilesAhead; ++i)
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        float x[kWidth];
        unpack<float>(bits[i][j], x);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) own[j][k] += x[k];
      }
  }
#pragma unroll
  for (int j = 0; j < kPieces; ++j)
    store_floats<kWidth>(sum + (lane + 32 * j) * kWidth, kWidth > 1, own[j]);
}

// The sum of t over all tiles of a matrix, whose t lie one after the other: thread c gets that of
// column begin + c, zero beyond the last column and the chunk. Each warp sums some of the tiles,
// in their order, and the warps follow in theirs. Every thread must call it, once.
__device__ __forceinline__ float sum_of_tiles(const Header& header, const Matrix& m,
                                              int64_t begin) {
  static_assert(kChunkColumns == 32 * kPerLoad<float> && kChunkColumns <= kThreads);
  __shared__ __align__(16) float sum[kWarps][kChunkColumns];
  const int64_t n = m.outer * m.inner;
  const int count = n - begin < kChunkColumns ? (int)(n - begin) : kChunkColumns;
  const float* t = at<const float>(header.t_partial) + begin;
  if (m.n_tiles > 0) t += at<const Tile>(header.tiles)[m.first_tile].t_offset;
  float (&own)[kChunkColumns] = sum[threadIdx.x / 32];
  if (n % kPerLoad<float> == 0 && is_aligned(t))
    add_tiles<kPerLoad<float>>(t, n, m.n_tiles, count, own);
  else
    add_tiles<1>(t, n, m.n_tiles, count, own);
  __syncthreads();
  float total = 0;
  if (threadIdx.x < kChunkColumns)
#pragma unroll
    for (int i = 0; i < kWarps; ++i) total += sum[i][threadIdx.x];
  return total;
}

}  // namespace cuda
}  // namespace spectral
