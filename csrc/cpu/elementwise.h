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
                                reinterpret_cast<const S*>(header.norm)[index], entry,
                                header.above != 0);
}

// Half of a vector of float32, as many numbers as a vector of float64 has. A vector of twice the
// processor's size in float64 would go through memory.
using f32h = float __attribute__((vector_size(SPECTRAL_BYTES / 2)));

SPECTRAL_INLINE f64v widened(f32v x) {  // the lower half
  f32h half;
  __builtin_memcpy(&half, &x, sizeof(half));
  return __builtin_convertvector(half, f64v);
}

SPECTRAL_INLINE f32v joined(f64v low, f64v high) {
  const f32h a = __builtin_convertvector(low, f32h), b = __builtin_convertvector(high, f32h);
#if SPECTRAL_BYTES == 64
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif SPECTRAL_BYTES == 32
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
#else
  return __builtin_shufflevector(a, b, 0, 1, 2, 3);
#endif
}

SPECTRAL_INLINE void add_squares(f64v& sum, f64v& other, f32v x) {
  const f64v low = widened(x), high = widened(upper_half(x));
  sum += low * low;
  other += high * high;
}
SPECTRAL_INLINE void add_squares(f64v& sum, f64v&, f64v x) { sum += x * x; }

// factor * x, rounded once.
SPECTRAL_INLINE f32v scaled(double factor, f32v x) {
  return joined(widened(x) * factor, widened(upper_half(x)) * factor);
}
SPECTRAL_INLINE f64v scaled(double factor, f64v x) { return x * factor; }

template <class T>
SPECTRAL_INLINE double row_squares(const T* row, int64_t n) {
  constexpr int kLanes = Simd<T>::kLanes;
  f64v sum{}, other{};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) add_squares(sum, other, Simd<T>::load(row + c));
  if (c < n) add_squares(sum, other, Tail<T>(n, c).load(row));
  return sum_lanes(sum + other);
}

// The gradient of a row at its elements: factor * x.
template <class T, class S = typename Simd<T>::Accumulator>
struct RowGradient {
  using V = typename Simd<T>::V;
  double factor;
  bool has_nan;  // some x may be NaN; see plain_nan

  // lr and constraint: see RowPull.
  SPECTRAL_INLINE RowGradient(const Header& header, const Elementwise& entry, int64_t index,
                              int64_t row, double lr, int64_t constraint) {
    const T* x = reinterpret_cast<const T*>(entry.weight) + row * entry.length;
    const double squares = row_squares(x, entry.length);
    factor = row_factor_of(squares, targets_of<S>(entry)[row],
                           strength_of<S>(header, header.n_matrices + index),
                           {header.exponent, lr, header.above != 0, constraint});
    has_nan = !is_finite(squares);
  }

  SPECTRAL_INLINE V of(V x) const {
    x = scaled(factor, x);
    if (has_nan)
      for (int i = 0; i < Simd<T>::kLanes; ++i) x[i] = factor == 0 ? 0 : plain_nan(x[i]);
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
    penalty += raw_penalty_of(norm, targets[row], header.exponent, header.above != 0);
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
  const bool above = header.above != 0;
  double squares = 0, gains = 0;
  for (int64_t i = 0; i < entry.size; i += Simd<T>::kLanes) {
    const int64_t left = entry.size - i;
    const auto lanes = left >= Simd<T>::kLanes ? Simd<T>::load(x + i) : load_part(x + i, left);
    for (int j = 0; j < Simd<T>::kLanes; ++j) squares += (double)lanes[j] * (double)lanes[j];
    if (entry.kind == kGain)
      for (int64_t j = 0; j < Simd<T>::kLanes && j < left; ++j)
        gains += gain_penalty_of(lanes[j], targets, i + j, k, above);
  }
  reinterpret_cast<S*>(header.norm)[index] = (S)__builtin_sqrt(squares);
  reinterpret_cast<S*>(header.raw_penalty)[header.n_matrices + index] =
      (S)(entry.kind == kGain ? gains : shift_penalty_of(squares, targets, k, above));
}

}  // namespace
}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
