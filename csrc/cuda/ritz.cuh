// Small matrices of float64 in shared memory: eigenvalues, and an orthonormal basis of candidates
// that are known by their products. The formulas are those of csrc/cpu/ritz.h, for the threads of a
// block side by side.
#pragma once

#include "../rounding.h"
#include "common.cuh"

namespace spectral {
namespace cuda {

template <int R>
using Small = double[R][R];

// Rows i < j of pair `pair` in a step: in R - 1 steps every two rows meet once, and the R / 2 pairs
// of a step have no row in common.
template <int R>
__device__ __forceinline__ void rows_of_pair(int step, int pair, int& i, int& j) {
  constexpr int kOthers = R - 1;  // that move in a circle, the last row stays
  const int a = pair == 0 ? kOthers : (step + pair) % kOthers;
  const int b = (step + kOthers - pair) % kOthers;
  i = a < b ? a : b;
  j = a < b ? b : a;
}

// Eigenvalues of a symmetric matrix without negative ones, largest first, and eigenvectors in the
// rows of q, by Jacobi rotations (Golub and Van Loan, "Matrix Computations", section 8.5) of pairs
// side by side. Products that are zero are never rotated: vectors of zeros stay apart from others.
// h is overwritten. Every thread must call it, after a barrier; ends with one.
template <int R>
__device__ __forceinline__ void eigen(Small<R>& h, double (&values)[R], Small<R>& q) {
  constexpr int kMaxSweeps = 20, kPairs = R / 2;
  constexpr double kNegligible =
      1e-32;  // square of an off-diagonal element, relative to the diagonal
  __shared__ double cosine[kPairs], sine[kPairs];
  __shared__ Small<R> unsorted;
  const int thread = threadIdx.x;
  if (thread < R * R) unsorted[thread / R][thread % R] = thread / R == thread % R;
#pragma unroll 1
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    bool rotated = false;
#pragma unroll 1
    for (int step = 0; step < R - 1; ++step) {
      if (thread < kPairs) {
        int i, j;
        rows_of_pair<R>(step, thread, i, j);
        const double x = h[i][j], both = fabs(h[i][i] * h[j][j]);
        cosine[thread] = 1, sine[thread] = 0;
        if (x != 0 && x * x > kNegligible * both) {
          rotated = true;
          const double theta = (h[j][j] - h[i][i]) / (2 * x);
          const double root = sqrt(theta * theta + 1);
          const double tangent = 1 / (theta >= 0 ? theta + root : theta - root);
          cosine[thread] = 1 / sqrt(tangent * tangent + 1);
          sine[thread] = tangent * cosine[thread];
          h[i][i] -= tangent * x;
          h[j][j] += tangent * x;
          h[i][j] = h[j][i] = 0;
        }
      }
      __syncthreads();
      // A thread per pair and column of q, the next ones per two pairs, whose rows meet in four
      // numbers of h.
      const int other = thread - kPairs * R;
      if (other < 0) {
        int i, j;
        rows_of_pair<R>(step, thread / R, i, j);
        const double c = cosine[thread / R], s = sine[thread / R];
        double &x = unsorted[i][thread % R], &y = unsorted[j][thread % R];
        const double a = x, b = y;
        x = c * a - s * b;
        y = s * a + c * b;
      } else if (other < kPairs * kPairs && other / kPairs < other % kPairs) {
        int i, j, k, l;
        rows_of_pair<R>(step, other / kPairs, i, j);
        rows_of_pair<R>(step, other % kPairs, k, l);
        const double c = cosine[other / kPairs], s = sine[other / kPairs];
        const double d = cosine[other % kPairs], e = sine[other % kPairs];
        const double ik = c * h[i][k] - s * h[j][k], jk = s * h[i][k] + c * h[j][k];
        const double il = c * h[i][l] - s * h[j][l], jl = s * h[i][l] + c * h[j][l];
        h[i][k] = h[k][i] = d * ik - e * il;
        h[i][l] = h[l][i] = e * ik + d * il;
        h[j][k] = h[k][j] = d * jk - e * jl;
        h[j][l] = h[l][j] = e * jk + d * jl;
      }
      __syncthreads();
    }
    if (!__syncthreads_or(rotated)) break;
  }
  if (thread < R * R) {
    const int i = thread / R, k = thread % R;
    int place = 0;
    for (int j = 0; j < R; ++j) place += h[j][j] > h[i][i] || (h[j][j] == h[i][i] && j < i);
    q[place][k] = unsorted[i][k];
    if (k == 0) values[place] = h[i][i];
  }
  __syncthreads();
}

// Gram-Schmidt on candidates, unit vectors or zero, given by their inner products alone. Each lane
// of a warp has one candidate; lanes beyond the last have zeros.
template <int R>
struct Basis {
  double products[2 * R][32];  // of the candidates
  double c[R][32];             // coefficients of the basis over the candidates
  double with[R][32];          // its products with the candidates

  __device__ __forceinline__ void clear() {
    for (int i = threadIdx.x; i < (int)(sizeof(Basis) / sizeof(double)); i += kThreads)
      products[0][i] = 0;
    __syncthreads();
  }

  // Makes candidate `which` vector j; returns false, and makes it zero, if it depends on earlier
  // ones.
  __device__ __forceinline__ bool take(int j, int which) {
    const int lane = threadIdx.x % 32;
    double row = lane == which, row_with = 0;
    // A second pass removes rounding errors.
#pragma unroll 1
    for (int k = 0; k < 2 * j; ++k) {
      const int before = k < j ? k : k - j;
      row -= sum_over_warp(row * with[before][lane]) * c[before][lane];
    }
#pragma unroll 4
    for (int i = 0; i < 2 * R; ++i)
      row_with += products[i][lane] * __shfl_sync(0xffffffffu, row, i);
    const double pivot = sum_over_warp(row * row_with);
    const double inverse = pivot > kSmallestPivot ? 1 / sqrt(pivot) : 0;
    c[j][lane] = row * inverse;
    with[j][lane] = row_with * inverse;
    return inverse > 0;
  }
};

}  // namespace cuda
}  // namespace spectral
