// Norm, penalty and gradient of elementwise parameters, a block for each: biases, shifts and gains
// as a whole. Of rows, a thread takes each of the short ones, and the block one long one after the
// other.
#pragma once

#include "penalty.cuh"

namespace spectral {
namespace cuda {

constexpr int64_t kShortRow = 256;  // elements of a row that one thread takes

// The gradient of a bias, shift or gain at the norm in the state.
__device__ __forceinline__ ElementwiseGradient<float> elementwise_gradient_of(
    const Header& header, const Elementwise& entry, int64_t index) {
  return ElementwiseGradient<float>(header.exponent, strength_of(header, header.n_matrices + index),
                                    at<const float>(header.norm)[index], entry, header.above != 0);
}

// The largest number of a block, in every thread; NaN if one is. Every thread must call it.
__device__ __forceinline__ double larger_over_block(double x) {
  __shared__ double partial[kWarps];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    x = larger(x, __shfl_xor_sync(0xffffffffu, x, distance));
  __syncthreads();  // `partial` may still be in use
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  double most = partial[0];
  for (int i = 1; i < kWarps; ++i) most = larger(most, partial[i]);
  return most;
}

// Calls use(row, squares, first, step): the calling thread has the elements first, first + step and
// so on of the row, the sum of whose squares is given. value(i) is element i of the parameter.
template <class Value, class Use>
__device__ __forceinline__ void for_rows(const Elementwise& entry, Value value, Use use) {
  const int64_t n_rows = entry.size == 0 ? 0 : entry.size / entry.length;
  const bool is_short = entry.length <= kShortRow;
  const int64_t first = is_short ? 0 : threadIdx.x, step = is_short ? 1 : kThreads;
  for (int64_t row = is_short ? threadIdx.x : 0; row < n_rows; row += is_short ? kThreads : 1) {
    double squares = 0;
    for (int64_t j = first; j < entry.length; j += step) {
      const double x = value(row * entry.length + j);
      squares += x * x;
    }
    if (!is_short) squares = sum_over_block(squares);
    use(row, squares, first, step);
  }
}

// What a row is multiplied by; lr and constraint: see RowPull.
__device__ __forceinline__ double row_factor(const Header& header, const Elementwise& entry,
                                             int64_t index, int64_t row, double squares, double lr,
                                             int64_t constraint) {
  return row_factor_of(squares, targets_of<float>(entry)[row],
                       strength_of(header, header.n_matrices + index),
                       {header.exponent, lr, header.above != 0, constraint});
}

template <class T>
__device__ __forceinline__ void elementwise_norm(const Header& header, int64_t index) {
  const Elementwise entry = at<const Elementwise>(header.elementwise)[index];
  const T* x = at<const T>(entry.weight);
  const float* targets = targets_of<float>(entry);
  const double k = header.exponent;
  const bool above = header.above != 0;
  double norm = 0, penalty = 0;
  if (entry.kind == kRows) {
    for_rows(
        entry, [&](int64_t i) { return (double)to_float(x[i]); },
        [&](int64_t row, double squares, int64_t first, int64_t) {
          norm = larger(norm, sqrt(squares));
          if (first == 0) penalty += raw_penalty_of(sqrt(squares), targets[row], k, above);
        });
    norm = larger_over_block(norm);
    penalty = sum_over_block(penalty);
  } else {
    double squares = 0, gains = 0;
    for (int64_t i = threadIdx.x; i < entry.size; i += kThreads) {
      const double value = to_float(x[i]);
      squares += value * value;
      if (entry.kind == kGain) gains += gain_penalty_of(value, targets, i, k, above);
    }
    squares = sum_over_block(squares);
    gains = sum_over_block(gains);
    norm = sqrt(squares);
    penalty = entry.kind == kGain ? gains : shift_penalty_of(squares, targets, k, above);
  }
  if (threadIdx.x > 0) return;
  at<float>(header.norm)[index] = (float)norm;
  at<float>(header.raw_penalty)[header.n_matrices + index] = (float)penalty;
}

}  // namespace cuda
}  // namespace spectral
