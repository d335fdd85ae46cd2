// Norm, penalty and gradient of elementwise parameters: biases, shifts and gains as a whole, rows
// one after the other. Sums of squares are float64.
#pragma once

#include "scalar_math.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

// The gradient of a bias, shift or gain at the norm in the state.
template <class S>
SPECTRAL_INLINE ElementwiseGradient<S> elementwise_gradient_of(const Header& header,
                                                               const Elementwise& entry,
                                                               int64_t index) {
  return ElementwiseGradient<S>(header.exponent, strength_of<S>(header, header.n_matrices + index),
                                reinterpret_cast<const S*>(header.norm)[index], entry);
}

// The lanes of a vector in float64.
using wide32v = double __attribute__((vector_size(2 * SPECTRAL_BYTES)));
SPECTRAL_INLINE wide32v widened(f32v x) { return __builtin_convertvector(x, wide32v); }
SPECTRAL_INLINE f64v widened(f64v x) { return x; }
SPECTRAL_INLINE f32v narrowed(wide32v x) { return __builtin_convertvector(x, f32v); }
SPECTRAL_INLINE f64v narrowed(f64v x) { return x; }

template <class T>
SPECTRAL_INLINE double row_squares(const T* row, int64_t n) {
  constexpr int kLanes = Simd<T>::kLanes;
  auto sums = widened(typename Simd<T>::V{});
  const auto add = [&](typename Simd<T>::V x) __attribute__((always_inline)) {
    const auto wide = widened(x);
    sums += wide * wide;
  };
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) add(Simd<T>::load(row + c));
  if (c < n) add(Tail<T>(n, c).load(row));
  double sum[kLanes];
  __builtin_memcpy(sum, &sums, sizeof(sum));
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  return sum[0];
}

// The gradient of a row at its elements: factor * x.
template <class T, class S = typename Simd<T>::Accumulator>
struct RowGradient {
  using V = typename Simd<T>::V;
  double factor;
  bool has_nan;  // some x may be NaN; see plain_nan

  // lr: 0, or the learning rate that the gradient is capped for.
  SPECTRAL_INLINE RowGradient(const Header& header, const Elementwise& entry, int64_t index,
                              int64_t row, double lr) {
    const T* x = reinterpret_cast<const T*>(entry.weight) + row * entry.length;
    const double squares = row_squares(x, entry.length);
    factor = row_factor_of(squares, targets_of<S>(entry)[row],
                           strength_of<S>(header, header.n_matrices + index), header.exponent, lr);
    has_nan = !is_finite(squares);
  }

  SPECTRAL_INLINE V of(V x) const {
    x = narrowed(widened(x) * factor);
    if (has_nan)
      for (int i = 0; i < Simd<T>::kLanes; ++i) x[i] = plain_nan(x[i]);
    return x;
  }
};

SPECTRAL_INLINE int64_t rows_of(const Elementwise& entry) {
  return entry.size == 0 ? 0 : entry.size / entry.length;
}

// The largest norm of a row, and the penalty of all rows.
template <class T, class S>
void rows_norm_of(const Header& header, const Elementwise& entry, int64_t index) {
  const T* x = reinterpret_cast<const T*>(entry.weight);
  const S* targets = targets_of<S>(entry);
  const int64_t n_rows = rows_of(entry);
  double most = 0, penalty = 0;
  for (int64_t row = 0; row < n_rows; ++row) {
    const double norm = __builtin_sqrt(row_squares(x + row * entry.length, entry.length));
    most = larger(most, norm);
    penalty += raw_penalty_of(norm, targets[row], header.exponent);
  }
  reinterpret_cast<S*>(header.norm)[index] = (S)most;
  reinterpret_cast<S*>(header.raw_penalty)[header.n_matrices + index] = (S)penalty;
}

// Norm and raw penalty of an elementwise parameter.
template <class T, class S = typename Simd<T>::Accumulator>
void elementwise_norm_of(const Header& header, int64_t index) {
  const Elementwise& entry = reinterpret_cast<const Elementwise*>(header.elementwise)[index];
  if (entry.kind == kRows) return rows_norm_of<T, S>(header, entry, index);
  const T* x = reinterpret_cast<const T*>(entry.weight);
  const S* targets = targets_of<S>(entry);
  const double k = header.exponent;
  double squares = 0, gains = 0;
  for (int64_t i = 0; i < entry.size; i += Simd<T>::kLanes) {
    const int64_t left = entry.size - i;
    const auto lanes = left >= Simd<T>::kLanes ? Simd<T>::load(x + i) : load_part(x + i, left);
    for (int j = 0; j < Simd<T>::kLanes; ++j) squares += (double)lanes[j] * (double)lanes[j];
    if (entry.kind == kGain)
      for (int64_t j = 0; j < Simd<T>::kLanes && j < left; ++j)
        gains += gain_penalty_of(lanes[j], targets, i + j, k);
  }
  reinterpret_cast<S*>(header.norm)[index] = (S)__builtin_sqrt(squares);
  reinterpret_cast<S*>(header.raw_penalty)[header.n_matrices + index] =
      (S)(entry.kind == kGain ? gains : shift_penalty_of(squares, targets, k));
}

}  // namespace
}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
