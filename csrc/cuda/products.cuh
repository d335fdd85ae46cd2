// s = W v, t = W^T s per tile and the squares of s, with one read of W from memory.
//
// A block takes a tile: some rows of one matrix. Each thread owns columns and holds those of a few
// rows in registers, as they lie in memory: from there they are multiplied by v, and when the sums
// of the rows are known, by s into t, each giving way to what the next rows have in its place, so
// that memory does not idle. Short rows belong to a warp, longer ones to the whole block; what of a
// very long row does not fit into registers is read again from the second-level cache.
//
// Where rows come from is a class such as Rows in rows.cuh. With kAhead the next rows are loaded
// piece by piece, else all pieces of some rows by load_pieces when their turn has come. Every
// element is loaded once, by the thread that owns its column, before s of its row is written;
// reload reads what has been loaded before.
#pragma once

#include "launch.h"
#include "rows.cuh"

namespace spectral {
namespace cuda {

constexpr int64_t kReservedBytes = 4 * 1024;  // of shared memory, for other uses

extern __shared__ float4 dynamic_shared[];

// Writes the n numbers of a tile's t, which are in shared memory; n is a multiple of kWidth.
template <int kWidth>
__device__ __forceinline__ void write_t(const float* shared, int64_t n, float* t) {
  using Bits = std::conditional_t<kWidth == 1, float, float4>;
  constexpr int kPerStore = (int)(sizeof(Bits) / sizeof(float));
#pragma unroll 1  // registers are few
  for (int64_t c = threadIdx.x; c < n / kPerStore; c += kThreads)
    reinterpret_cast<Bits*>(t)[c] = reinterpret_cast<const Bits*>(shared)[c];
}

// Rows of at most 32 * kPieces loads: kGroup in a row belong to a warp, which takes kRows at a time
// and whose t has the same bits for any kRows. Returns the sum of the squares of this thread's part
// of s.
template <int kPieces, int kRows, int kGroup = kRows, class Source>
__device__ __forceinline__ double short_rows(const Source& w, const Operands& o) {
  static_assert(!Source::kAhead || kGroup == kRows);
  constexpr int kWidth = Source::kWidth, kStep = kWarps * kGroup, kLanes = 32 / kRows;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = (int)w.n;
  const bool aligned = is_aligned(o.v);
  float x[kPieces][kWidth] = {}, sum[kPieces][kWidth] = {};
  typename Source::Bits held[kPieces][kRows] = {};
  if constexpr (Source::kAhead)
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int c = (lane + 32 * j) * kWidth;
      if (c >= n) continue;
      load_floats<kWidth>(o.v + c, aligned, x[j]);
      w.template load<kRows>(warp * kRows, c, [&](int r, auto bits) { held[j][r] = bits; });
    }
  double squares = 0;
  for (int row = warp * kGroup, next; row < w.count; row = next) {
    const bool ends_group = kGroup == kRows || (row + kRows) % kGroup == 0;
    next = row + kRows + (ends_group ? kStep - kGroup : 0);
    if constexpr (!Source::kAhead) {
      w.template load_pieces<kPieces, kRows>(row, lane * kWidth, 32 * kWidth,
                                             [&](int j, int r, auto bits) { held[j][r] = bits; });
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int c = (lane + 32 * j) * kWidth;
        if (c < n) load_floats<kWidth>(o.v + c, aligned, x[j]);
      }
    }
    float product[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int j = 0; j < kPieces; ++j) product[r] += w.dot(held[j][r], x[j]);
    const float own = sum_rows_over_warp(product);
    if (lane % kLanes == 0 && row + lane / kLanes < w.count) {
      o.s[row + lane / kLanes] = own;
      squares += (double)own * (double)own;
    }
    const float scaled = o.scale(own);
#pragma unroll
    for (int r = 0; r < kRows; ++r) product[r] = __shfl_sync(0xffffffffu, scaled, r * kLanes);
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int c = (lane + 32 * j) * kWidth;
      if (c >= n) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) w.add(held[j][r], product[r], sum[j]);
      if constexpr (Source::kAhead)
        w.template load<kRows>(next, c, [&](int r, auto bits) { held[j][r] = bits; });
    }
  }
  if (o.t == nullptr) return squares;
  float* t = reinterpret_cast<float*>(dynamic_shared);
  for (int turn = 0; turn < kWarps; ++turn) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const int c = (lane + 32 * j) * kWidth + i;
        if (warp == turn && c < n) t[c] = turn == 0 ? sum[j][i] : t[c] + sum[j][i];
      }
    __syncthreads();
  }
  write_t<kWidth>(t, n, o.t);
  return squares;
}

// Sums one row over the warps, with the same bits in every thread.
__device__ __forceinline__ float sum_of(const float (&partial)[kWarps]) {
  float total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += partial[i];
  return total;
}

// Longer rows: kRows at a time belong to the block, whose threads hold kPieces loads of each and
// sum t up in shared memory. kRest: rows may be longer than what is held, and than that memory.
template <int kPieces, int kRows, bool kRest, class Source>
__device__ __forceinline__ double long_rows(const Source& w, const Operands& o,
                                            int64_t shared_floats) {
  constexpr int kWidth = Source::kWidth, kHeld = kPieces * kThreads * kWidth;
  constexpr int kStride = kThreads * kWidth, kLanes = 32 / kRows;
  __shared__ __align__(16) float partial[2][kRows][kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int n_held = kRest && w.n > kHeld ? kHeld : (int)w.n;
  const bool aligned = is_aligned(o.v);
  const bool in_shared = !kRest || w.n <= shared_floats;
  float* const shared = reinterpret_cast<float*>(dynamic_shared);
  float* const t = in_shared ? shared : o.t;
  typename Source::Bits held[kPieces][kRows] = {};
  if constexpr (Source::kAhead)
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int c = threadIdx.x * kWidth + kStride * j;
      if (c >= n_held) continue;
      w.template load<kRows>(0, c, [&](int r, auto bits) { held[j][r] = bits; });
    }
  double squares = 0;
  int turn = 0;
  for (int row = 0; row < w.count; row += kRows, turn ^= 1) {
    if constexpr (!Source::kAhead)
      w.template load_pieces<kPieces, kRows>(row, threadIdx.x * kWidth, kStride,
                                             [&](int j, int r, auto bits) { held[j][r] = bits; });
    float product[kRows] = {};
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int c = threadIdx.x * kWidth + kStride * j;
      if (c >= n_held) continue;
      float x[kWidth];
      load_floats<kWidth>(o.v + c, aligned, x);
#pragma unroll
      for (int r = 0; r < kRows; ++r) product[r] += w.dot(held[j][r], x);
    }
    if constexpr (kRest)
#pragma unroll 1
      for (int64_t c = kHeld + threadIdx.x * kWidth; c < w.n; c += kStride) {
        float x[kWidth];
        load_floats<kWidth>(o.v + c, aligned, x);
        w.template load<kRows>(row, c, [&](int r, auto bits) { product[r] += w.dot(bits, x); });
      }
    // Warps without columns have nothing to sum. Two buffers in turn need one barrier per turn.
    const float own = warp * 32 * kWidth < n_held ? sum_rows_over_warp(product) : 0;
    if (lane % kLanes == 0) partial[turn][lane / kLanes][warp] = own;
    __syncthreads();
    if (threadIdx.x < kRows && row + (int)threadIdx.x < w.count) {
      const float s = sum_of(partial[turn][threadIdx.x]);
      o.s[row + threadIdx.x] = s;
      squares += (double)s * (double)s;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) product[r] = o.scale(sum_of(partial[turn][r]));
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int c = threadIdx.x * kWidth + kStride * j;
      if (c >= n_held) continue;
      if (o.t != nullptr) {
        float sum[kWidth] = {};
        if (row > 0) load_floats<kWidth>(t + c, true, sum);
#pragma unroll
        for (int r = 0; r < kRows; ++r) w.add(held[j][r], product[r], sum);
        store_floats<kWidth>(t + c, true, sum);
      }
      if constexpr (Source::kAhead)
        w.template load<kRows>(row + kRows, c, [&](int r, auto bits) { held[j][r] = bits; });
    }
    if constexpr (kRest)
#pragma unroll 1
      for (int64_t c = kHeld + threadIdx.x * kWidth; c < w.n && o.t != nullptr; c += kStride) {
        float sum[kWidth] = {};
        if (row > 0) load_floats<kWidth>(t + c, true, sum);
        w.template reload<kRows>(row, c, [&](int r, auto bits) { w.add(bits, product[r], sum); });
        store_floats<kWidth>(t + c, true, sum);
      }
  }
  if (o.t == nullptr || !in_shared) return squares;
  __syncthreads();
  write_t<kWidth>(shared, w.n, o.t);
  return squares;
}

// Inputs and outputs of the products of a tile with v.
__device__ __forceinline__ Operands operands_of(const Header& header, const Tile& tile,
                                                const Matrix& m, int64_t v) {
  return {at<const float>(v) + m.v_offset, at<float>(header.s) + m.s_offset + tile.row_begin,
          header.t_partial == 0 ? nullptr : at<float>(header.t_partial) + tile.t_offset,
          Scale(binary_exponent(at<const float>(header.sigmas)[tile.matrix]))};
}

// Bytes of shared memory for the longest row, as long as two blocks fit into a multiprocessor. Each
// has 45 KB at least, on any device of those that the kernels are compiled for.
inline int64_t bytes_for_t(const Header& header, int device, const char* what) {
  if (header.t_partial == 0) return 0;
  int both = 0, driver = 0;
  check(cudaDeviceGetAttribute(&both, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), what);
  check(cudaDeviceGetAttribute(&driver, cudaDevAttrReservedSharedMemoryPerBlock, device), what);
  const int64_t most = both / 2 - driver - kReservedBytes;
  const int64_t wanted = header.scratch_size * (int64_t)sizeof(float);
  return wanted < most ? wanted : most / kLoadBytes * kLoadBytes;
}

}  // namespace cuda
}  // namespace spectral
