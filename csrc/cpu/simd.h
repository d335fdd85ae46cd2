// Vectors of one instruction-set level through the vector extensions of GCC and Clang.
//
// Compiled once per level with that level's flags, so nothing here may come from the standard
// library: an inline function compiled for AVX-512 could be the one the linker keeps for all.
#pragma once

#include <stddef.h>
#include <stdint.h>
#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define SPECTRAL_BYTES 64
#elif defined(__AVX2__)
#define SPECTRAL_BYTES 32
#else
#define SPECTRAL_BYTES 16
#endif

#define SPECTRAL_INLINE inline __attribute__((always_inline))

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

using f32v = float __attribute__((vector_size(SPECTRAL_BYTES)));
using f64v = double __attribute__((vector_size(SPECTRAL_BYTES)));
using u32v = uint32_t __attribute__((vector_size(SPECTRAL_BYTES)));
using u16v = uint16_t __attribute__((vector_size(SPECTRAL_BYTES / 2)));

template <class V>
SPECTRAL_INLINE V load_bits(const void* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof(V));
  return x;
}

template <class V>
SPECTRAL_INLINE void store_bits(void* p, V x) {
  __builtin_memcpy(p, &x, sizeof(V));
}

// a * b + c, rounded once where the level has an instruction for it. Left to the compiler, it would
// depend on the code around it, and two ways to the same sums would not have the same bits.
SPECTRAL_INLINE f32v fused(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
  return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (f32v)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

SPECTRAL_INLINE f64v fused(f64v a, f64v b, f64v c) {
#if defined(__AVX512F__)
  return (f64v)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (f64v)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (f64v)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

SPECTRAL_INLINE double fused(double a, double b, double c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// A vector times a number, plus a vector.
SPECTRAL_INLINE f32v fused(f32v a, float b, f32v c) { return fused(a, b - f32v{}, c); }
SPECTRAL_INLINE f64v fused(f64v a, double b, f64v c) { return fused(a, b - f64v{}, c); }

// Conversions of 16-bit floats: exact one way, to the nearest even the other.

// To bfloat16, left in the upper half of each element; the lower half is not cleared. A NaN must
// have no bits set in its lower half, or the rounding could carry it into another number: NaNs
// read from bfloat16 and those that arithmetic makes have none.
SPECTRAL_INLINE u32v bfloat16_upper(f32v value) {
  const u32v x = (u32v)value;
  return x + 0x7fffu + ((x >> 16) & 1u);
}

template <class S>
SPECTRAL_INLINE S plain_nan(S x) {
  return x == x ? x : (S)__builtin_nan("");
}

#ifndef __F16C__
SPECTRAL_INLINE f32v float16_value(u32v h) {
  u32v sign = (h & 0x8000u) << 16;
  u32v magnitude = (h & 0x7fffu) << 13;
  u32v special = (u32v)((h & 0x7c00u) == 0x7c00u);
  // A multiplication by 2^112 moves the exponent and normalizes subnormal numbers.
  u32v finite = (u32v)((f32v)magnitude * 0x1p112f);
  u32v value = (special & (magnitude | 0x7f800000u)) | (~special & finite);
  return (f32v)(value | sign);
}

SPECTRAL_INLINE u32v float16_bits(u32v x) {
  u32v sign = (x >> 16) & 0x8000u;
  u32v a = x & 0x7fffffffu;
  u32v normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 leaves the subnormal half, rounded, in the low bits of the sum.
  u32v subnormal = (u32v)((f32v)a + 0.5f) - 0x3f000000u;
  u32v is_subnormal = (u32v)(a < 0x38800000u);
  u32v overflows = (u32v)(a >= 0x477ff000u);
  u32v nan = (u32v)(a > 0x7f800000u);
  u32v bits = (is_subnormal & subnormal) | (~is_subnormal & normal);
  bits = (overflows & 0x7c00u) | (~overflows & bits);
  bits = (nan & 0x7e00u) | (~nan & bits);
  return bits | sign;
}
#endif

// Simd<T>: vectors of Accumulator elements, read from and written to arrays of T, a pair of vectors
// at a time. kSplits: the pair holds the even and the odd elements instead of the first and second
// half, which needs no shuffle; code that uses such pairs brings v and t into split_order first.
template <class T>
struct Simd;

template <class T, class Elementwise, class S>
struct Contiguous {
  using Accumulator = S;
  using V = Elementwise;
  static constexpr int kLanes = sizeof(V) / sizeof(S);
  static constexpr bool kSplits = false;
  static SPECTRAL_INLINE void load_pair(const T* p, V& a, V& b) {
    a = Simd<T>::load(p);
    b = Simd<T>::load(p + kLanes);
  }
  static SPECTRAL_INLINE void store_pair(T* p, V a, V b) {
    Simd<T>::store(p, a);
    Simd<T>::store(p + kLanes, b);
  }
};

template <>
struct Simd<float> : Contiguous<float, f32v, float> {
  static SPECTRAL_INLINE V load(const float* p) { return load_bits<V>(p); }
  static SPECTRAL_INLINE void store(float* p, V x) { store_bits(p, x); }
};

template <>
struct Simd<double> : Contiguous<double, f64v, double> {
  static SPECTRAL_INLINE V load(const double* p) { return load_bits<V>(p); }
  static SPECTRAL_INLINE void store(double* p, V x) { store_bits(p, x); }
};

template <>
struct Simd<bfloat16> {
  using Accumulator = float;
  using V = f32v;
  static constexpr int kLanes = SPECTRAL_BYTES / 4;
  static constexpr bool kSplits = true;
  static SPECTRAL_INLINE void load_pair(const bfloat16* p, V& even, V& odd) {
    const u32v bits = load_bits<u32v>(p);
    even = (V)(bits << 16);
    odd = (V)(bits & 0xffff0000u);
  }
  static SPECTRAL_INLINE void store_pair(bfloat16* p, V even, V odd) {
    store_bits(p, (bfloat16_upper(even) >> 16) | (bfloat16_upper(odd) & 0xffff0000u));
  }
  static SPECTRAL_INLINE V load(const bfloat16* p) {
    return (V)(__builtin_convertvector(load_bits<u16v>(p), u32v) << 16);
  }
  static SPECTRAL_INLINE void store(bfloat16* p, V x) {
    store_bits(p, __builtin_convertvector(bfloat16_upper(x) >> 16, u16v));
  }
};

template <>
struct Simd<float16> : Contiguous<float16, f32v, float> {
#if defined(__AVX512F__)
  static SPECTRAL_INLINE V load(const float16* p) {
    return (V)_mm512_maskz_cvtph_ps(0xffff, load_bits<__m256i>(p));
  }
  static SPECTRAL_INLINE void store(float16* p, V x) {
    store_bits(p, _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  static SPECTRAL_INLINE V load(const float16* p) {
    return (V)_mm256_cvtph_ps(load_bits<__m128i>(p));
  }
  static SPECTRAL_INLINE void store(float16* p, V x) {
    store_bits(p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static SPECTRAL_INLINE V load(const float16* p) {
    return float16_value(__builtin_convertvector(load_bits<u16v>(p), u32v));
  }
  static SPECTRAL_INLINE void store(float16* p, V x) {
    store_bits(p, __builtin_convertvector(float16_bits((u32v)x), u16v));
  }
#endif
};

alignas(64) constexpr int32_t kMask[2 * SPECTRAL_BYTES / 4] = {
#if SPECTRAL_BYTES == 64
    0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
    -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
#elif SPECTRAL_BYTES == 32
    0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1,
#else
    0, 0, 0, 0, -1, -1, -1, -1,
#endif
};

// All bits set in the last n lanes of a V, none in the others.
template <class V>
SPECTRAL_INLINE u32v last_lanes(int64_t n) {
  return load_bits<u32v>((const char*)kMask + n * sizeof(V{}[0]));
}

// The first n < kLanes elements of a vector of kBytes, as bits; the rest are zero. Only these n are
// read or written.
template <int kSize, int kBytes>
struct Part {
  static constexpr bool kInOne = false;  // one instruction
  struct Bits {
    char bytes[kBytes];
  };

  // In pieces of a power of two, at most one of each.
  template <int kPiece>
  static SPECTRAL_INLINE void copy(char* to, const char* from, int64_t bytes) {
    if (bytes & kPiece) {
      __builtin_memcpy(to, from, kPiece);
      to += kPiece;
      from += kPiece;
    }
    if constexpr (kPiece > kSize) copy<kPiece / 2>(to, from, bytes);
  }
  static SPECTRAL_INLINE Bits load(const void* p, int64_t n) {
    Bits x{};
    copy<kBytes / 2>(x.bytes, (const char*)p, n * kSize);
    return x;
  }
  static SPECTRAL_INLINE void store(void* p, Bits x, int64_t n) {
    copy<kBytes / 2>((char*)p, x.bytes, n * kSize);
  }
};

#if defined(__AVX512BW__) && defined(__AVX512VL__)
template <int kSize>
struct Part<kSize, 64> {
  static constexpr bool kInOne = true;
  static SPECTRAL_INLINE __mmask64 mask(int64_t n) { return ((uint64_t)1 << n * kSize) - 1; }
  static SPECTRAL_INLINE __m512i load(const void* p, int64_t n) {
    return _mm512_maskz_loadu_epi8(mask(n), p);
  }
  static SPECTRAL_INLINE void store(void* p, __m512i x, int64_t n) {
    _mm512_mask_storeu_epi8(p, mask(n), x);
  }
};
template <int kSize>
struct Part<kSize, 32> {
  static constexpr bool kInOne = true;
  static SPECTRAL_INLINE __mmask32 mask(int64_t n) { return ((uint32_t)1 << n * kSize) - 1; }
  static SPECTRAL_INLINE __m256i load(const void* p, int64_t n) {
    return _mm256_maskz_loadu_epi8(mask(n), p);
  }
  static SPECTRAL_INLINE void store(void* p, __m256i x, int64_t n) {
    _mm256_mask_storeu_epi8(p, mask(n), x);
  }
};
#elif defined(__AVX2__)
template <int kSize>
struct Part<kSize, 32> {
  static constexpr bool kInOne = true;
  static SPECTRAL_INLINE __m256i mask(int64_t n) {
    return (__m256i)~last_lanes<f32v>(8 - n * kSize / 4);
  }
  static SPECTRAL_INLINE __m256i load(const void* p, int64_t n) {
    return _mm256_maskload_epi32((const int*)p, mask(n));
  }
  static SPECTRAL_INLINE void store(void* p, __m256i x, int64_t n) {
    _mm256_maskstore_epi32((int*)p, mask(n), x);
  }
};
#endif

template <class T>
using PartOf = Part<sizeof(T), sizeof(T) * Simd<T>::kLanes>;

// The first n < kLanes elements; the rest of the vector is zero.
template <class T>
SPECTRAL_INLINE typename Simd<T>::V load_part(const T* p, int64_t n) {
  T padded[Simd<T>::kLanes];
  store_bits(padded, PartOf<T>::load(p, n));
  return Simd<T>::load(padded);
}

template <class T>
SPECTRAL_INLINE void store_part(T* p, typename Simd<T>::V x, int64_t n) {
  T padded[Simd<T>::kLanes];
  Simd<T>::store(padded, x);
  PartOf<T>::store(p, load_bits<decltype(PartOf<T>::load(p, n))>(padded), n);
}

// The end of a row that full vectors have not covered, n = 1 to kLanes - 1 elements: if the row
// is long enough, the last full vector of the row is used, so that nothing is copied.
template <class T>
struct Tail {
  using V = typename Simd<T>::V;
  int64_t n, start;  // first element that is loaded and stored
  bool overlaps;

  SPECTRAL_INLINE Tail(int64_t row, int64_t covered)
      : n(row - covered),
        start(row >= Simd<T>::kLanes ? row - Simd<T>::kLanes : covered),
        overlaps(row >= Simd<T>::kLanes) {}
  // Lanes before the tail are zero.
  template <class E>
  SPECTRAL_INLINE V load(const E* row) const {
    if (!overlaps) return load_part(row + start, n);
    return (V)((u32v)Simd<E>::load(row + start) & last_lanes<V>(n));
  }
  // The opposite: the lanes of the tail are zero.
  template <class E>
  SPECTRAL_INLINE V load_before(const E* row) const {
    return overlaps ? (V)((u32v)Simd<E>::load(row + start) & ~last_lanes<V>(n)) : V{};
  }
  // Lanes before the tail keep their values in memory, to be stored unchanged.
  template <class E>
  SPECTRAL_INLINE V load_all(const E* row) const {
    return overlaps ? Simd<E>::load(row + start) : load_part(row + start, n);
  }
  template <class E>
  SPECTRAL_INLINE void store(E* row, V x) const {
    if (overlaps)
      Simd<E>::store(row + start, x);
    else
      store_part(row + start, x, n);
  }
};

// Brings every full pair of vectors of x into the order in which Simd<T>::load_pair reads.
template <class T, class S>
SPECTRAL_INLINE void split_order(const S* x, S* out, int64_t n) {
  constexpr int kLanes = Simd<T>::kLanes;
  int64_t c = 0;
  for (; c + 2 * kLanes <= n; c += 2 * kLanes)
    for (int i = 0; i < kLanes; ++i) {
      out[c + i] = x[c + 2 * i];
      out[c + kLanes + i] = x[c + 2 * i + 1];
    }
  for (; c < n; ++c) out[c] = x[c];
}

// Undoes split_order, in place.
template <class T, class S>
SPECTRAL_INLINE void memory_order(S* x, int64_t n) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t c = 0; c + 2 * kLanes <= n; c += 2 * kLanes) {
    S pair[2 * kLanes];
    for (int i = 0; i < kLanes; ++i) {
      pair[2 * i] = x[c + i];
      pair[2 * i + 1] = x[c + kLanes + i];
    }
    for (int i = 0; i < 2 * kLanes; ++i) x[c + i] = pair[i];
  }
}

// Moves the upper half of the lanes down; the lanes above are unspecified.
SPECTRAL_INLINE f32v upper_half(f32v x) {
#if SPECTRAL_BYTES == 64
  return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 0, 0, 0, 0, 0, 0, 0);
#elif SPECTRAL_BYTES == 32
  return __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 0, 0, 0);
#else
  return __builtin_shufflevector(x, x, 2, 3, 0, 0);
#endif
}

// The sum of the lanes, always in the same order.
SPECTRAL_INLINE float sum_lanes(f32v x) {
  x += upper_half(x);
  float total = 0;
  for (int i = 0; i < SPECTRAL_BYTES / 8; i += 2) total += x[i] + x[i + 1];
  return total;
}

SPECTRAL_INLINE double sum_lanes(f64v x) {
  double total = 0;
  for (int i = 0; i < SPECTRAL_BYTES / 8; ++i) total += x[i];
  return total;
}

SPECTRAL_INLINE bool is_finite(double x) { return __builtin_isfinite(x); }

SPECTRAL_INLINE double pow_of(double x, double k) { return __builtin_pow(x, k); }
SPECTRAL_INLINE double sqrt_of(double x) { return __builtin_sqrt(x); }
SPECTRAL_INLINE double abs_of(double x) { return __builtin_fabs(x); }

SPECTRAL_INLINE uint64_t bits_of(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, 8);
  return bits;
}

SPECTRAL_INLINE double double_of(uint64_t bits) {
  double x;
  __builtin_memcpy(&x, &bits, 8);
  return x;
}

// Calls function(T{}) with the element type that the table names.
template <class Function>
SPECTRAL_INLINE void with_dtype(int64_t dtype, Function function) {
  switch (dtype) {
    case kFloat32:
      return function(float{});
    case kFloat64:
      return function(double{});
    case kBFloat16:
      return function(bfloat16{});
    case kFloat16:
      return function(float16{});
  }
}

}  // namespace
}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
