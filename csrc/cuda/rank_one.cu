// The penalty's gradient, and the stage that turns t and the squares of s into sigma and the next
// v.
//
// Both in one launch: the first blocks take a chunk of a matrix each and sum its t, the next take a
// tile each and add strength * 2 k (sigma^k - tau^k) sigma^(k-1) u v^T with u = s / sigma to the
// gradient, the last ones the elementwise parameters. No block waits for another: the last
// block to complete a chunk of a matrix finishes the matrix, and blocks of tiles add up the squares
// themselves. With several vectors per matrix or a tolerance, v and s change as well, so
// that there are two launches; see ritz.cu for the first.

#include <type_traits>

#include "backend.h"
#include "chunks.cuh"
#include "elementwise.cuh"
#include "launch.h"
#include "subspace.h"

namespace spectral {
namespace cuda {
namespace {

constexpr int kRowsAhead = 8;  // whose loads are in flight per thread

struct Parts {
  bool finish, gradient, accumulate;
};

// The sums of t of a chunk, into v_next; with a tolerance, what was there becomes v. Returns the
// sum of their squares, in every thread.
__device__ __forceinline__ double sum_chunk(const Header& header, const Matrix& m, int64_t begin) {
  const double sum = sum_of_tiles(header, m, begin);
  const int64_t c = begin + threadIdx.x;
  if (threadIdx.x < kChunkColumns && c < m.outer * m.inner) {
    float& v_next = at<float>(header.v_next)[m.v_offset + c];
    if (header.tolerance > 0) at<float>(header.v)[m.v_offset + c] = v_next;
    v_next = (float)sum;
  }
  return sum_over_block(sum * sum);
}

// Tells every thread whether the block is the last one with a chunk of the matrix to call it. What
// all of them wrote before is then in the second-level cache. Every thread must call it.
__device__ __forceinline__ bool is_last(const Header& header, const Matrix& m, int64_t index) {
  __shared__ bool last;
  const int64_t n = m.outer * m.inner;
  const unsigned others = n > 0 ? (unsigned)((n - 1) / kChunkColumns) : 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    // Wraps to 0 after the last one.
    last = atomicInc(at<unsigned>(header.arrivals) + index, others) == others;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// to = factor * from, n numbers that may be other blocks'; kWidth > 1: aligned ones.
template <int kWidth>
__device__ __forceinline__ void multiply(const float* from, double factor, int64_t n, float* to) {
  using Bits = std::conditional_t<kWidth == 1, float, uint4>;
  constexpr int kAhead = 4;  // loads in flight per thread
  constexpr int64_t kStride = kThreads * kWidth;
  for (int64_t c = threadIdx.x * kWidth; c < n; c += kAhead * kStride) {
    Bits bits[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (c + i * kStride < n)
        bits[i] = __ldcg(reinterpret_cast<const Bits*>(from + c + i * kStride));
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (c + i * kStride >= n) continue;
      float x[kWidth];
      unpack<float>(bits[i], x);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) x[j] = (float)(x[j] * factor);
      store_floats<kWidth>(to + c + i * kStride, kWidth > 1, x);
    }
  }
}

// Makes v_next of the sums that are there and returns their norm; where there is no direction,
// v_next is v. first_chunk: that of the matrix.
__device__ __forceinline__ double normalize(const Header& header, const Matrix& m,
                                            int64_t first_chunk, double sigma) {
  const int64_t n = m.outer * m.inner;
  const double* squares = at<const double>(header.chunk_squares) + first_chunk;
  double sum = 0;
  for (int64_t i = threadIdx.x; i * kChunkColumns < n; i += kThreads) sum += __ldcg(squares + i);
  const double t_norm = sqrt(sum_over_block(sum));
  const bool good = isfinite(t_norm) && t_norm > 0 && isfinite(sigma);
  float* v_next = at<float>(header.v_next) + m.v_offset;
  const float* from = good ? v_next : at<const float>(header.v) + m.v_offset;
  const double factor = good ? 1 / t_norm : 1;
  if (n % kPerLoad<float> == 0 && is_aligned(from) && is_aligned(v_next))
    multiply<kPerLoad<float>>(from, factor, n, v_next);
  else
    multiply<1>(from, factor, n, v_next);
  return t_norm;
}

// Sums up a chunk, and finishes the matrix after the last of its chunks. All blocks have looked at
// the old sigma and residual when the last one writes the new ones.
__device__ __forceinline__ void finish_chunk(const Header& header, int64_t chunk_index) {
  const Chunk chunk = at<const Chunk>(header.chunks)[chunk_index];
  const int64_t index = chunk.matrix;
  if (!takes_part(header, index)) return;
  const Matrix m = at<const Matrix>(header.matrices)[index];
  const bool with_t = header.t_partial != 0;
  if (with_t) {
    const double squares = sum_chunk(header, m, chunk.begin);
    if (threadIdx.x == 0) at<double>(header.chunk_squares)[chunk_index] = squares;
  }
  if (!is_last(header, m, index)) return;
  const double sigma = sqrt(sum_of_squares(header, m));
  const int64_t first_chunk = chunk_index - chunk.begin / kChunkColumns;
  const double t_norm = with_t ? normalize(header, m, first_chunk, sigma) : 0;
  if (threadIdx.x > 0) return;
  float& stored = at<float>(header.sigmas)[index];
  if (with_t)
    at<float>(header.residuals)[index] =
        (float)residual_of(sigma, t_norm, power_of_two(-binary_exponent(stored)));
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

__device__ __forceinline__ void elementwise_gradient(const Header& header, int64_t index,
                                                     bool accumulate) {
  const Elementwise entry = at<const Elementwise>(header.elementwise)[index];
  const auto value = [&](int64_t i) {
    return (double)load_element(entry.weight, header.weight_dtype, i);
  };
  const auto put = [&](int64_t i, float sum) {
    if (accumulate) sum += load_element(entry.grad, entry.grad_dtype, i);
    with_dtype(entry.grad_dtype, [&](auto type) {
      using G = decltype(type);
      at<G>(entry.grad)[i] = from_float<G>(sum);
    });
  };
  if (entry.kind == kRows)
    return for_rows(entry, value, [&](int64_t row, double squares, int64_t first, int64_t step) {
      const double factor = row_factor(header, entry, index, row, squares, 0, kFree);
      for (int64_t j = first; j < entry.length; j += step) {
        const int64_t i = row * entry.length + j;
        put(i, (float)(factor * value(i)));
      }
    });
  const ElementwiseGradient<float> gradient = elementwise_gradient_of(header, entry, index);
  for (int64_t i = threadIdx.x; i < entry.size; i += kThreads)
    put(i, (float)gradient.of(value(i), i));
}

// gradient: the first n_tiles blocks take a tile each, the n_elementwise after them an elementwise
// parameter each; finish: n_chunks more, a chunk each. They are bound by memory latency, the tiles
// by bandwidth: they are placed after half of the tiles.
__global__ void __launch_bounds__(kThreads, 2) rank_one_kernel(const Header header, Parts parts) {
  int64_t block = blockIdx.x;
  const int64_t chunk = block - (parts.gradient ? header.n_tiles / 2 : 0);
  if (parts.finish && chunk >= 0) {
    if (chunk < header.n_chunks) return finish_chunk(header, chunk);
    block -= header.n_chunks;
  }
  if (block >= header.n_tiles) {
    block -= header.n_tiles;
    if (at<const Elementwise>(header.elementwise)[block].grad != 0)
      elementwise_gradient(header, block, parts.accumulate);
    return;
  }
  const Tile tile = at<const Tile>(header.tiles)[block];
  const Matrix m = at<const Matrix>(header.matrices)[tile.matrix];
  if (m.grad == 0) return;
  // Rounded as stored, so that the gradient has the same bits as with two launches.
  const double sigma = parts.finish ? (float)sqrt(sum_of_squares(header, m))
                                    : at<const float>(header.sigmas)[tile.matrix];
  const double factor = gradient_factor(header, tile.matrix, sigma);
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
  if (finish && turns) {
    if (header.n_matrices == 0) return;
    const DeviceGuard guard(device, "rank_one");
    return ritz("rank_one", header, stream);
  }
  const int64_t blocks =
      (finish ? header.n_chunks : 0) + (gradient ? header.n_tiles + header.n_elementwise : 0);
  if (blocks == 0) return;
  const DeviceGuard guard(device, "rank_one");
  launch<Header, Parts>("rank_one", rank_one_kernel, blocks, kThreads, 0, stream, header,
                        Parts{finish, gradient, accumulate});
}

}  // namespace cuda
}  // namespace spectral
