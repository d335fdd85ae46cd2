// What an optimizer's step multiplies by a factor of a row, or adds, at the elements of a stretch
// of weights: x of a penalty's gradient. `one` gives those of a vector of elements from c on,
// `pair` those of two, `part` n of them.
#pragma once

#include "elementwise.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

// x of a row of a matrix: v, in split order if pairs are.
template <class S>
struct RowFactor {
  static constexpr bool kIsRead = true;  // and not computed: it may be asked for twice
  const S* v;
  template <class V>
  SPECTRAL_INLINE void pair(int64_t c, V& x0, V& x1) const {
    x0 = Simd<S>::load(v + c);
    x1 = Simd<S>::load(v + c + Simd<S>::kLanes);
  }
  SPECTRAL_INLINE auto one(int64_t c) const { return Simd<S>::load(v + c); }
  SPECTRAL_INLINE auto part(int64_t c, int64_t n) const { return load_part(v + c, n); }
};

// x of a row of an operator: the gradient itself, of two terms a * v; in split order if pairs are.
template <class S>
struct TwoTermFactor {
  static constexpr bool kIsRead = true;  // it costs little
  const S* v;
  int64_t distance;  // between the vectors
  S a0, a1;
  SPECTRAL_INLINE auto one(int64_t c) const {
    return Simd<S>::load(v + c) * a0 + Simd<S>::load(v + distance + c) * a1;
  }
  template <class V>
  SPECTRAL_INLINE void pair(int64_t c, V& x0, V& x1) const {
    x0 = one(c);
    x1 = one(c + Simd<S>::kLanes);
  }
  SPECTRAL_INLINE auto part(int64_t c, int64_t n) const {
    return load_part(v + c, n) * a0 + load_part(v + distance + c, n) * a1;
  }
};

// x of a row of a matrix of which n singular values are capped: the sum of their a * v; in split
// order if pairs are.
template <class S>
struct SumFactor {
  static constexpr bool kIsRead = false;
  const S* v;
  int64_t distance;  // between the vectors
  const S* a;
  int64_t n;
  // of(v): the numbers of a vector.
  template <class Of>
  SPECTRAL_INLINE auto sum(Of of) const {
    auto x = of(v) * a[0];
    for (int64_t j = 1; j < n; ++j) x += of(v + j * distance) * a[j];
    return x;
  }
  SPECTRAL_INLINE auto one(int64_t c) const {
    return sum([&](const S* of) { return Simd<S>::load(of + c); });
  }
  template <class V>
  SPECTRAL_INLINE void pair(int64_t c, V& x0, V& x1) const {
    x0 = one(c);
    x1 = one(c + Simd<S>::kLanes);
  }
  SPECTRAL_INLINE auto part(int64_t c, int64_t n) const {
    return sum([&](const S* of) { return load_part(of + c, n); });
  }
};

// x of a bias, shift or gain: the gradient itself.
template <class T, class S, class Gradient>
struct ElementwiseFactor {
  using V = typename Simd<T>::V;
  static constexpr bool kIsRead = false;
  const T* p;
  const Gradient& gradient;

  // Of n elements, the first of which is c, every `step`-th one.
  SPECTRAL_INLINE V of(V x, int64_t c, int step, int64_t n) const {
    for (int i = 0; i < n; ++i) x[i] = plain_nan((S)gradient.of(x[i], c + i * step));
    return x;
  }
  SPECTRAL_INLINE void pair(int64_t c, V& x0, V& x1) const {
    constexpr int kLanes = Simd<T>::kLanes, kStep = Simd<T>::kSplits ? 2 : 1;
    Simd<T>::load_pair(p + c, x0, x1);
    x0 = of(x0, c, kStep, kLanes);
    x1 = of(x1, c + (Simd<T>::kSplits ? 1 : kLanes), kStep, kLanes);
  }
  SPECTRAL_INLINE V one(int64_t c) const { return of(Simd<T>::load(p + c), c, 1, Simd<T>::kLanes); }
  SPECTRAL_INLINE V part(int64_t c, int64_t n) const { return of(load_part(p + c, n), c, 1, n); }
};

// x of a row: the gradient itself.
template <class T>
struct OneRowFactor {
  using V = typename Simd<T>::V;
  static constexpr bool kIsRead = false;
  const T* p;
  const RowGradient<T> gradient;

  SPECTRAL_INLINE void pair(int64_t c, V& x0, V& x1) const {
    Simd<T>::load_pair(p + c, x0, x1);
    x0 = gradient.of(x0);
    x1 = gradient.of(x1);
  }
  SPECTRAL_INLINE V one(int64_t c) const { return gradient.of(Simd<T>::load(p + c)); }
  SPECTRAL_INLINE V part(int64_t c, int64_t n) const { return gradient.of(load_part(p + c, n)); }
};

// x of a parameter without a penalty.
template <class V>
struct NoFactor {
  static constexpr bool kIsRead = true;
  SPECTRAL_INLINE void pair(int64_t, V& x0, V& x1) const { x0 = x1 = V{}; }
  SPECTRAL_INLINE V one(int64_t) const { return V{}; }
  SPECTRAL_INLINE V part(int64_t, int64_t) const { return V{}; }
};

}  // namespace
}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
