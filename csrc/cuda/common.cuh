// Element types, wide loads, sums in a fixed order and scalar formulas, for all CUDA kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "../table.h"

namespace spectral {
namespace cuda {

constexpr int kThreads = 256;  // of a block
constexpr int kWarps = kThreads / 32;
constexpr int kLoadBytes = 16;  // maximum of one load
template <class T>
constexpr int kPerLoad = kLoadBytes / (int)sizeof(T);

// Converts an address to a pointer. The compiler does not know that it points to global memory;
// where that matters, the kernels use load and store functions that imply it (__ldcg, ...).
template <class T>
__device__ __forceinline__ T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// Returns whether every row starts and ends at a multiple of kLoadBytes.
template <class T>
__device__ __forceinline__ bool is_aligned(int64_t address, int64_t row_stride, int64_t n,
                                           int64_t outer) {
  return outer == 1 && address % kLoadBytes == 0 && row_stride % kPerLoad<T> == 0 &&
         n % kPerLoad<T> == 0;
}

// ------------------------------------------------------------------------------- element types

template <class T>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<__nv_bfloat16> = true;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t bits_of(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
__device__ __forceinline__ uint32_t bits_of(__half x) { return __half_as_ushort(x); }

// Unpacks the elements of one load, in memory order.
template <class T>
__device__ __forceinline__ void unpack(const uint4& bits, float (&x)[kPerLoad<T>]) {
  const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(word[i]);
    } else if constexpr (is_bfloat16<T>) {
      x[2 * i] = __uint_as_float(word[i] << 16);
      x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    } else {
      x[2 * i] = __half2float(__ushort_as_half((unsigned short)(word[i] & 0xffffu)));
      x[2 * i + 1] = __half2float(__ushort_as_half((unsigned short)(word[i] >> 16)));
    }
  }
}

template <class T>
__device__ __forceinline__ void unpack(const T& element, float (&x)[1]) {
  x[0] = to_float(element);
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&x)[kPerLoad<T>]) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      word[i] = __float_as_uint(x[i]);
    else if constexpr (is_bfloat16<T>)
      word[i] = bits_of(__float2bfloat16_rn(x[2 * i])) | bits_of(__float2bfloat16_rn(x[2 * i + 1]))
                                                             << 16;
    else
      word[i] = bits_of(__float2half_rn(x[2 * i])) | bits_of(__float2half_rn(x[2 * i + 1])) << 16;
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// Calls function(T{}) with the element type that the table names, float32 or narrower.
template <class Function>
__device__ __forceinline__ void with_dtype(int64_t dtype, Function function) {
  switch (dtype) {
    case kFloat32:
      return function(float{});
    case kBFloat16:
      return function(__nv_bfloat16{});
    case kFloat16:
      return function(__half{});
  }
}

// n consecutive numbers of the state; aligned: they start at a multiple of kLoadBytes.
template <int n>
__device__ __forceinline__ void load_floats(const float* p, bool aligned, float* x) {
  if (n % 4 == 0 && aligned) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(p + i);
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = p[i];
  }
}

template <int n>
__device__ __forceinline__ void store_floats(float* p, bool aligned, const float* x) {
  if (n % 4 == 0 && aligned) {
#pragma unroll
    for (int i = 0; i < n; i += 4)
      *reinterpret_cast<float4*>(p + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) p[i] = x[i];
  }
}

__device__ __forceinline__ bool is_aligned(const float* p) {
  return reinterpret_cast<uintptr_t>(p) % kLoadBytes == 0;
}

// Offset of column c of a row in pieces, relative to the row.
__device__ __forceinline__ int64_t column_offset(int64_t c, int64_t inner, int64_t outer_stride) {
  if (((c | inner) >> 32) == 0) {  // a division of 32 bits is many times faster
    const uint32_t piece = (uint32_t)c / (uint32_t)inner;
    return piece * outer_stride + ((uint32_t)c - piece * (uint32_t)inner);
  }
  return c / inner * outer_stride + c % inner;
}

// --------------------------------------------------------------------------------------- sums

// The sum over a warp, the same bits in every lane.
template <class S>
__device__ __forceinline__ S sum_over_warp(S x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// The sum over a block, the same bits in every thread. Every thread must call it.
__device__ __forceinline__ double sum_over_block(double x) {
  __shared__ double partial[kWarps];
  x = sum_over_warp(x);
  __syncthreads();  // `partial` may still be in use by an earlier sum
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kWarps; ++i) total += partial[i];
  return total;
}

// --------------------------------------------------------------------------- scalar formulas

__device__ __forceinline__ bool is_finite(float x) { return isfinite(x); }
__device__ __forceinline__ bool is_finite(double x) { return isfinite(x); }
__device__ __forceinline__ double pow_of(double x, double k) { return pow(x, k); }
__device__ __forceinline__ double sqrt_of(double x) { return sqrt(x); }
__device__ __forceinline__ double abs_of(double x) { return fabs(x); }
__device__ __forceinline__ uint64_t bits_of(double x) { return __double_as_longlong(x); }
__device__ __forceinline__ double double_of(uint64_t bits) { return __longlong_as_double(bits); }

}  // namespace cuda
}  // namespace spectral

#define SPECTRAL_LEVEL cuda
#define SPECTRAL_FORMULA __device__ __forceinline__
#include "../formulas.h"

namespace spectral {
namespace cuda {

__device__ __forceinline__ bool takes_part(const Header& header, int64_t matrix) {
  return header.tolerance == 0 ||
         is_stale(header.tolerance, at<const float>(header.residuals)[matrix],
                  at<const float>(header.sigmas)[matrix]);
}

__device__ __forceinline__ void put_penalty(const Header& header, int64_t index, double sigma) {
  at<float>(header.raw_penalty)[index] = (float)raw_penalty_of(
      sigma, at<const float>(header.target)[index], header.exponent, header.above != 0);
}

}  // namespace cuda
}  // namespace spectral
