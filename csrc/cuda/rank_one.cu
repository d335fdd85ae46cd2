// The penalty's gradient, and the stage that turns t and the squares of s into sigma and the next
// v.
//
// Both in one launch: the first blocks take a matrix each and finish its sums, the next take a tile
// each and add strength * 2 k (sigma^k - tau^k) sigma^(k-1) u v^T with u = s / sigma to the
// gradient, the last ones the vectors. The blocks of tiles do not wait for those of matrices: they
// add the few squares up themselves. With several vectors per matrix or a tolerance, v and s change
// as well, so that there are two launches; see ritz.cu for the first.

#include <type_traits>

#include "backend.h"
#include "common.cuh"
#include "finish.cuh"
#include "launch.h"
#include "penalty.cuh"
#include "subspace.h"

namespace spectral {
namespace cuda {
namespace {

constexpr int kRowsAhead = 8;  // whose loads a thread has under way

struct Parts {
  bool finish, accumulate;
};

// Writes v_next of one matrix and returns the norm of the sum of t.
__device__ __forceinline__ double normalize(const Header& header, const Matrix& m, double sigma) {
  const int64_t n = m.outer * m.inner;
  const float* v = at<const float>(header.v) + m.v_offset;
  float* v_next = at<float>(header.v_next) + m.v_offset;
  const double t_norm = sqrt(reduce_tiles(header, m, n, v_next));
  const bool good = isfinite(t_norm) && t_norm > 0 && isfinite(sigma);
  const double inverse = 1 / t_norm;
  for (int64_t c = threadIdx.x; c < n; c += kThreads)
    v_next[c] = good ? (float)(v_next[c] * inverse) : v[c];
  return t_norm;
}

__device__ __forceinline__ void finish_matrix(const Header& header, int64_t index) {
  const Matrix m = at<const Matrix>(header.matrices)[index];
  if (!begins(header, m, index)) return;
  const double sigma = sqrt(sum_of_squares(header, m));
  const bool with_t = header.t_partial != 0;
  const double t_norm = with_t ? normalize(header, m, sigma) : 0;
  if (threadIdx.x > 0) return;
  float& stored = at<float>(header.sigma)[index];
  if (with_t)
    at<float>(header.residual)[index] = (float)residual_of(sigma, t_norm, binary_exponent(stored));
  put_penalty(header, index, sigma);
  stored = (float)sigma;
}

// grad = (accumulate ? grad : 0) + a[r] * x of kWidth columns in rows first, first + step, ...
template <class G, bool kAligned, int kWidth>
__device__ __forceinline__ void add_columns(G* grad, int64_t row_stride, const float* a, int first,
                                            int step, int count, const float (&x)[kWidth],
                                            bool accumulate) {
  using Bits = std::conditional_t<kAligned, uint4, G>;
  for (int row = first; row < count; row += kRowsAhead * step) {
    Bits bits[kRowsAhead] = {};
    Bits* p[kRowsAhead];
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) {
      p[i] = reinterpret_cast<Bits*>(grad + (row + i * step) * row_stride);
      if (accumulate && row + i * step < count) bits[i] = __ldcg(p[i]);
    }
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) {
      if (row + i * step >= count) continue;
      float value[kWidth];
      unpack<G>(bits[i], value);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) value[j] += a[row + i * step] * x[j];
      if constexpr (kAligned)
        __stcg(p[i], pack<G>(value));
      else
        __stcg(p[i], from_float<G>(value[0]));
    }
  }
}

// The gradient of a tile: threads side by side along the columns, and in several rows where those
// are short.
template <class G>
__device__ __forceinline__ void tile_gradient(const Header& header, const Tile& tile,
                                              const Matrix& m, double factor, bool accumulate) {
  __shared__ float a[kThreads];
  const int64_t n = m.outer * m.inner;
  const float* v = at<const float>(header.v) + m.v_offset;
  const float* s = at<const float>(header.s) + m.s_offset;
  const bool wide = is_aligned<G>(m.grad, m.grad_row_stride, n, m.outer);
  const bool v_aligned = is_aligned(v);
  const int width = wide ? kPerLoad<G> : 1;
  int side = 1;
  while (side < kThreads && side * width < n) side *= 2;
  const int first = threadIdx.x / side, step = kThreads / side;
  for (int64_t row = tile.row_begin; row < tile.row_end; row += kThreads) {
    const int count = tile.row_end - row < kThreads ? (int)(tile.row_end - row) : kThreads;
    __syncthreads();
    if (threadIdx.x < count)
      a[threadIdx.x] = factor == 0 ? 0 : (float)(factor * s[row + threadIdx.x]);
    __syncthreads();
    G* grad = at<G>(m.grad) + row * m.grad_row_stride;
    for (int64_t c = threadIdx.x % side * width; c < n; c += side * width) {
      if (wide) {
        float x[kPerLoad<G>];
        load_floats<kPerLoad<G>>(v + c, v_aligned, x);
        add_columns<G, true>(grad + c, m.grad_row_stride, a, first, step, count, x, accumulate);
      } else {
        const float x[1] = {v[c]};
        G* column = grad + (m.outer == 1 ? c : column_offset(c, m.inner, m.grad_outer_stride));
        add_columns<G, false>(column, m.grad_row_stride, a, first, step, count, x, accumulate);
      }
    }
  }
}

__device__ __forceinline__ float load_element(int64_t address, int64_t dtype, int64_t i) {
  float x = 0;
  with_dtype(dtype, [&](auto type) { x = to_float(at<const decltype(type)>(address)[i]); });
  return x;
}

__device__ __forceinline__ void vector_gradient(const Header& header, int64_t index,
                                                bool accumulate) {
  const Vector vector = at<const Vector>(header.vectors)[index];
  const VectorGradient gradient(header, vector, index);
  for (int64_t i = threadIdx.x; i < vector.size; i += kThreads) {
    float sum = gradient.of(load_element(vector.weight, header.weight_dtype, i));
    if (accumulate) sum += load_element(vector.grad, vector.grad_dtype, i);
    with_dtype(vector.grad_dtype, [&](auto type) {
      using G = decltype(type);
      at<G>(vector.grad)[i] = from_float<G>(sum);
    });
  }
}

// finish: block i < n_matrices takes matrix i; gradient: the following n_tiles blocks a tile each,
// the n_vectors after them a vector each.
__global__ void __launch_bounds__(kThreads, 2) rank_one_kernel(const Header header, Parts parts) {
  int64_t block = blockIdx.x;
  if (parts.finish) {
    if (block < header.n_matrices) return finish_matrix(header, block);
    block -= header.n_matrices;
  }
  if (block >= header.n_tiles) {
    block -= header.n_tiles;
    if (at<const Vector>(header.vectors)[block].grad != 0)
      vector_gradient(header, block, parts.accumulate);
    return;
  }
  const Tile tile = at<const Tile>(header.tiles)[block];
  const Matrix m = at<const Matrix>(header.matrices)[tile.matrix];
  if (m.grad == 0) return;
  const double factor = gradient_factor(header, m, tile.matrix, parts.finish);
  with_dtype(m.grad_dtype, [&](auto type) {
    tile_gradient<decltype(type)>(header, tile, m, factor, parts.accumulate);
  });
}

}  // namespace

void rank_one(const Header& header, int device, int64_t stream, bool finish, bool gradient,
              bool accumulate) {
  check_dtype(header, "rank_one");
  const bool turns = header.r > 1;
  if (finish && gradient && (turns || header.tolerance > 0)) {
    // The gradient reads the v, s and sigma that the first launch writes.
    rank_one(header, device, stream, true, false, accumulate);
    return rank_one(header, device, stream, false, true, accumulate);
  }
  const int64_t blocks =
      (finish ? header.n_matrices : 0) + (gradient ? header.n_tiles + header.n_vectors : 0);
  if (blocks == 0) return;
  const DeviceGuard guard(device, "rank_one");
  if (finish && turns) return ritz("rank_one", header, stream);
  launch<Header, Parts>("rank_one", rank_one_kernel, blocks, kThreads, 0, stream, header,
                        Parts{finish, accumulate});
}

}  // namespace cuda
}  // namespace spectral
