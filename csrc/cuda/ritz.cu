// The stage that finishes a matrix with several vectors: Rayleigh-Ritz and the next V. A block
// takes a matrix, its threads columns; sums of vectors are float64.

#include "launch.h"
#include "ritz.cuh"
#include "subspace.h"

namespace spectral {
namespace cuda {
namespace {

constexpr int kColumnsAhead = 4;  // whose loads are in flight per thread

// Returns whether the call is about the matrix; with a tolerance, copies v_next to v. Every thread
// must call it before any writes sigma or residual.
__device__ __forceinline__ bool begins(const Header& header, const Matrix& m, int64_t index) {
  if (header.tolerance == 0) return true;
  if (!takes_part(header, index)) return false;
  float* v = at<float>(header.v) + m.v_offset;
  const float* v_next = at<const float>(header.v_next) + m.v_offset;
  for (int64_t c = threadIdx.x; c < header.r * m.outer * m.inner; c += kThreads) v[c] = v_next[c];
  __syncthreads();
  return true;
}

// to = sum of the n numbers of t over the tiles. A matrix's partial sums lie one after the other.
// Ends with a barrier.
__device__ __forceinline__ void reduce_tiles(const Header& header, const Matrix& m, int64_t n,
                                             float* to) {
  const float* t = at<const float>(header.t_partial);
  if (m.n_tiles > 0) t += at<const Tile>(header.tiles)[m.first_tile].t_offset;
  for (int64_t c = threadIdx.x; c < n; c += kColumnsAhead * kThreads) {
    float sum[kColumnsAhead] = {};
#pragma unroll 8
    for (int64_t i = 0; i < m.n_tiles; ++i)
#pragma unroll
      for (int j = 0; j < kColumnsAhead; ++j)
        if (c + j * kThreads < n) sum[j] += t[i * n + c + j * kThreads];
#pragma unroll
    for (int j = 0; j < kColumnsAhead; ++j)
      if (c + j * kThreads < n) to[c + j * kThreads] = sum[j];
  }
  __syncthreads();
}

// x x^T of vectors x [R, n], in shared memory. A thread reads the columns that combine gives it.
// Ends with a barrier.
template <int R>
__device__ __forceinline__ void gram_of(const float* x, int64_t n, Small<R>& gram) {
  constexpr int kSide = R < 4 ? R : 4;  // of what a thread sums up at a time
  __shared__ double partial[kWarps][kSide * kSide];
#pragma unroll 1
  for (int part = 0; part < (R / kSide) * (R / kSide); ++part) {
    const int first = part / (R / kSide) * kSide, second = part % (R / kSide) * kSide;
    if (second > first) continue;
    double sum[kSide][kSide] = {};
#pragma unroll 2
    for (int64_t c = threadIdx.x; c < n; c += kThreads) {
      double a[kSide], b[kSide];
#pragma unroll
      for (int j = 0; j < kSide; ++j) a[j] = x[(first + j) * n + c], b[j] = x[(second + j) * n + c];
#pragma unroll
      for (int j = 0; j < kSide; ++j)
#pragma unroll
        for (int k = 0; k < kSide; ++k) sum[j][k] += a[j] * b[k];
    }
#pragma unroll
    for (int j = 0; j < kSide; ++j)
#pragma unroll
      for (int k = 0; k < kSide; ++k) {
        const double total = sum_over_warp(sum[j][k]);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][j * kSide + k] = total;
      }
    __syncthreads();
    if (threadIdx.x < kSide * kSide) {
      const int j = first + threadIdx.x / kSide, k = second + threadIdx.x % kSide;
      double total = 0;
      for (int i = 0; i < kWarps; ++i) total += partial[i][threadIdx.x];
      gram[j][k] = gram[k][j] = total;
    }
    __syncthreads();
  }
}

// out[j] = sum over i of c[j][i] x[i] + d[j][i] y[i], which may be x itself; y may be null.
template <int R>
__device__ __forceinline__ void combine(const Small<R>& c, const float* x, const Small<R>& d,
                                        const float* y, int64_t n, float* out) {
#pragma unroll 1
  for (int64_t column = threadIdx.x; column < n; column += kThreads) {
    double a[R], b[R];
#pragma unroll
    for (int i = 0; i < R; ++i) {
      a[i] = x[i * n + column];
      if (y != nullptr) b[i] = y[i * n + column];
    }
#pragma unroll 1
    for (int j = 0; j < R; ++j) {
      double sum = 0;
#pragma unroll
      for (int i = 0; i < R; ++i) {
        sum += c[j][i] * a[i];
        if (y != nullptr) sum += d[j][i] * b[i];
      }
      out[j * n + column] = (float)sum;
    }
  }
}

// Shared memory of the block of a matrix.
template <int R>
struct Found {
  Small<R> products;  // of s
  Small<R> q;         // eigenvectors of these
  Small<R> gram;      // t t^T, of the next vectors in the end
  Small<R> half;      // q gram; then coefficients over t
  Small<R> beside;    // coefficients over the turned v
  double squares[R], sigma[R];
  double t_norm[R];   // of the turned t
  double inverse[R];  // of that; 0: such a t is rounding
  Basis<R> basis;
};

// Squares, sigma and what turns v and s; false where the products are not finite: nothing turns.
template <int R>
__device__ __forceinline__ bool find_values(const Header& header, const Matrix& m,
                                            Found<R>& found) {
  const double* partial = at<const double>(header.gram_partial) + m.first_tile * R * R;
  const int j = threadIdx.x / R, k = threadIdx.x % R;
  if (j < R) {
    double sum = 0;
    for (int64_t i = 0; i < m.n_tiles; ++i) sum += partial[i * R * R + threadIdx.x];
    found.products[j][k] = sum;
  }
  __syncthreads();
  double trace = 0;
  for (int i = 0; i < R; ++i) trace += found.products[i][i];
  __syncthreads();
  const bool finite = isfinite(trace);
  if (finite) {
    eigen<R>(found.products, found.squares, found.q);
  } else {
    if (j < R) found.q[j][k] = j == k;
    if (j == 0) found.squares[k] = trace;
    __syncthreads();
  }
  if (j == 0) {
    const bool is_rounding = finite && found.squares[k] <= kZero * found.squares[0];
    found.sigma[k] = is_rounding ? 0 : sqrt(found.squares[k]);
  }
  __syncthreads();
  return finite;
}

// t_norm; false where there is no t to make the next vectors of.
template <int R>
__device__ __forceinline__ bool find_norms(Found<R>& found) {
  const int j = threadIdx.x / R, k = threadIdx.x % R;
  if (j < R) {
    double sum = 0;
    for (int i = 0; i < R; ++i) sum += found.q[j][i] * found.gram[i][k];
    found.half[j][k] = sum;
  }
  __syncthreads();
  if (j == 0) {
    double square = 0;
    for (int i = 0; i < R; ++i) square += found.half[k][i] * found.q[k][i];
    found.t_norm[k] = square > 0 ? sqrt(square) : square <= 0 ? 0 : square;
  }
  __syncthreads();
  bool good = found.t_norm[0] > 0;
  for (int i = 0; i < R; ++i) good = good && isfinite(found.t_norm[i]);
  return good;
}

// Coefficients of an orthonormal basis of the turned t, in half over the t and in beside over the
// turned v. Where one of the t depends on those before it, the turned v takes its place; where that
// does too, there is none (R > n), and the row is zero. scale: what s was multiplied by.
template <int R>
__device__ __forceinline__ void find_basis(Found<R>& found, double scale) {
  Basis<R>& basis = found.basis;
  const int j = threadIdx.x / R, k = threadIdx.x % R;
  basis.clear();
  if (j == 0) {
    double reach = 0;
    for (int i = 0; i < R; ++i) reach += fabs(found.q[k][i]) * sqrt(found.gram[i][i]);
    const bool sound =
        found.squares[k] > kZero * found.squares[0] && reach <= kMaxAmplified * found.t_norm[k];
    found.inverse[k] = sound ? 1 / found.t_norm[k] : 0;
  }
  __syncthreads();
  // Candidates below R are the turned t as units, those above the turned v.
  if (j < R) {
    double product = 0;
    for (int i = 0; i < R; ++i) product += found.half[j][i] * found.q[k][i];
    basis.products[j][k] = product * found.inverse[j] * found.inverse[k];
    const double mixed = j == k ? scale * found.squares[j] * found.inverse[j] : 0;
    basis.products[j][R + k] = basis.products[R + k][j] = mixed;
    basis.products[R + j][R + k] = j == k;
  }
  __syncthreads();
  if (threadIdx.x < 32)
#pragma unroll 1
    for (int i = 0; i < R; ++i)
      if (found.inverse[i] == 0 || !basis.take(i, i)) basis.take(i, R + i);
  __syncthreads();
  if (j < R) {
    double sum = 0;
    for (int i = 0; i < R; ++i) sum += basis.c[j][i] * found.inverse[i] * found.q[i][k];
    found.half[j][k] = sum;
    found.beside[j][k] = basis.c[j][R + k];
  }
  __syncthreads();
}

// Orthonormalizes vectors that are nearly orthonormal, or zero.
template <int R>
__device__ __forceinline__ void orthonormalize(float* x, int64_t n, Found<R>& found) {
  Basis<R>& basis = found.basis;
  const int j = threadIdx.x / R, k = threadIdx.x % R;
  gram_of<R>(x, n, found.gram);
  basis.clear();
  if (j < R) basis.products[j][k] = found.gram[j][k];
  __syncthreads();
  if (threadIdx.x < 32)
#pragma unroll 1
    for (int i = 0; i < R; ++i) basis.take(i, i);
  __syncthreads();
  if (j < R) found.half[j][k] = basis.c[j][k];
  __syncthreads();
  combine<R>(found.half, x, found.half, nullptr, n, x);
}

// Block i takes matrix i.
template <int R>
__global__ void __launch_bounds__(kThreads, 2) ritz_kernel(const Header header) {
  __shared__ Found<R> found;
  const int64_t index = blockIdx.x;
  const Matrix m = at<const Matrix>(header.matrices)[index];
  if (!begins(header, m, index)) return;
  float* const sigmas = at<float>(header.sigmas) + index;
  const int e = binary_exponent(*sigmas);
  const bool finite = find_values(header, m, found);
  if (header.t_partial != 0) {
    const int64_t n = m.outer * m.inner;
    float* const v = at<float>(header.v) + m.v_offset;
    float* const v_next = at<float>(header.v_next) + m.v_offset;
    float* const s = at<float>(header.s) + m.s_offset;
    reduce_tiles(header, m, R * n, v_next);
    gram_of<R>(v_next, n, found.gram);
    const bool good = find_norms(found) && finite;
    if (finite) {
      combine<R>(found.q, v, found.q, nullptr, n, v);
      combine<R>(found.q, s, found.q, nullptr, m.rows, s);
    }
    if (good) {
      find_basis(found, power_of_two(-e));
      combine<R>(found.half, v_next, found.beside, v, n, v_next);
      orthonormalize(v_next, n, found);
    } else {
      for (int64_t c = threadIdx.x; c < n; c += kThreads)
        for (int j = 0; j < R; ++j) v_next[j * n + c] = v[j * n + c];
    }
  }
  const int j = threadIdx.x;
  if (j >= R) return;
  if (header.t_partial != 0)
    at<float>(header.residuals)[j * header.n_matrices + index] =
        (float)residual_of(found.sigma[j], found.t_norm[j], power_of_two(-e));
  sigmas[j * header.n_matrices] = (float)found.sigma[j];
  if (j == 0) put_penalty(header, index, found.sigma[0]);
}

}  // namespace

void ritz(const char* what, const Header& header, int64_t stream) {
  const auto kernel = header.r == 2   ? ritz_kernel<2>
                      : header.r == 4 ? ritz_kernel<4>
                      : header.r == 8 ? ritz_kernel<8>
                                      : ritz_kernel<16>;
  launch<Header>(what, kernel, header.n_matrices, kThreads, 0, stream, header);
}

}  // namespace cuda
}  // namespace spectral
