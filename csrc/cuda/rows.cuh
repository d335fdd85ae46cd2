// Reads the rows of a tile with the threads of a block.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace spectral {
namespace cuda {

// A thread loads kWidth neighbouring columns at once: kLoadBytes of rows that are aligned, one
// element of others, which may also lie in pieces.
template <class T, bool kAligned>
struct Rows {
  using Element = T;
  static constexpr bool kAhead = true;
  static constexpr int kWidth = kAligned ? kPerLoad<T> : 1;
  using Bits = std::conditional_t<kAligned, uint4, T>;

  const T* first;
  int64_t stride, outer, inner, outer_stride, n;
  int count;

  __device__ __forceinline__ Rows(const Matrix& m, const Tile& tile)
      : first(at<const T>(m.weight) + tile.row_begin * m.row_stride),
        stride(m.row_stride),
        outer(m.outer),
        inner(m.inner),
        outer_stride(m.outer_stride),
        n(m.outer * m.inner),
        count((int)(tile.row_end - tile.row_begin)) {}

  // Calls use(r, bits) with column c of kRows rows from the given one on, zeros beyond the tile.
  // Wide loads leave the first-level cache to v, which is read more than once.
  template <int kRows, class Use>
  __device__ __forceinline__ void load(int row, int64_t c, Use use) const {
    const T* p = first + row * stride;
    if constexpr (kAligned)
      p += c;
    else
      p += outer == 1 ? c : column_offset(c, inner, outer_stride);
#pragma unroll
    for (int r = 0; r < kRows; ++r, p += stride) {
      Bits bits{};
      if (row + r < count) {
        if constexpr (kAligned)
          bits = __ldcg(reinterpret_cast<const uint4*>(p));
        else
          bits = __ldca(p);
      }
      use(r, bits);
    }
  }

  // Loads again what has been loaded before.
  template <int kRows, class Use>
  __device__ __forceinline__ void reload(int row, int64_t c, Use use) const {
    load<kRows>(row, c, use);
  }

  __device__ __forceinline__ float dot(const Bits& bits, const float (&x)[kWidth]) const {
    float w[kWidth], sum = 0;
    unpack<T>(bits, w);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += w[i] * x[i];
    return sum;
  }

  __device__ __forceinline__ void add(Bits bits, float a, float (&sum)[kWidth]) const {
    // The compiler, which cannot know that this is zero, unpacks the bits a second time. To keep
    // the numbers from the first time would take twice the registers that the bits take.
    if constexpr (kAligned && sizeof(T) < 4) {
      const uint32_t zero = (uint32_t)count >> 31;
      bits = make_uint4(bits.x ^ zero, bits.y ^ zero, bits.z ^ zero, bits.w ^ zero);
    }
    float w[kWidth];
    unpack<T>(bits, w);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum[i] += a * w[i];
  }
};

// Sums kRows numbers over a warp: lane l gets the sum of number l / (32 / kRows). Each step leaves
// every lane with half of the numbers.
template <int kRows, int kDistance = 16>
__device__ __forceinline__ float sum_rows_over_warp(const float (&x)[kRows]) {
  constexpr int kHalf = kRows > 1 ? kRows / 2 : 1;
  float sum[kHalf];
  const bool upper = threadIdx.x & kDistance;
#pragma unroll
  for (int r = 0; r < kHalf; ++r) {
    const float kept = upper ? x[kRows - kHalf + r] : x[r];
    const float given = upper ? x[r] : x[kRows - kHalf + r];
    sum[r] = kept + __shfl_xor_sync(0xffffffffu, given, kDistance);
  }
  if constexpr (kDistance > 1)
    return sum_rows_over_warp<kHalf, kDistance / 2>(sum);
  else
    return sum[0];
}

// Multiplies by 2^-e in two steps, since 2^149 is not a float32 number.
struct Scale {
  float half, other_half;
  __device__ __forceinline__ explicit Scale(int e)
      : half((float)power_of_two(-(e / 2))), other_half((float)power_of_two(e / 2 - e)) {}
  __device__ __forceinline__ float operator()(float s) const { return s * half * other_half; }
};

// Inputs and outputs of the products of a tile.
struct Operands {
  const float* v;
  float* s;
  float* t;  // null: only s is wanted; starts at a multiple of 16 bytes where all rows do
  Scale scale;
};

}  // namespace cuda
}  // namespace spectral
