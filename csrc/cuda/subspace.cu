// The products of a tile with several vectors: S = V W^T, S S^T and T = S W.
//
// A block takes a tile in chunks of rows that stay in the second-level cache. A warp multiplies a
// few rows, or a slice of their columns where rows are long and few, by kVectors vectors at a time.
// When the chunk's S is known, its rows are read again: each thread adds them to its columns of T,
// in memory. Every sum has one order, so that results are the same bits in every run.

#include "elementwise.cuh"
#include "launch.h"
#include "rows.cuh"
#include "subspace.h"

namespace spectral {
namespace cuda {
namespace {

constexpr int kRows = 4;                     // that go through registers together
constexpr int kMaxChunk = 64;                // rows
constexpr int64_t kChunkBytes = 128 * 1024;  // of W: two blocks per multiprocessor share the cache
static_assert(kMaxChunk >= kWarps * kRows);  // room for every warp's slice

// kWidth numbers of the state with the first at p, zeros beyond the given ones.
template <int kWidth>
__device__ __forceinline__ void load_columns(const float* p, int64_t n, bool aligned,
                                             float (&x)[kWidth]) {
  if (aligned) return load_floats<kWidth>(p, true, x);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] = i < n ? p[i] : 0;
}

// A tile, the same for all threads of its block.
template <class T>
struct Task {
  static constexpr int kWidth = kPerLoad<T>;
  const T* first;
  const float* v;
  float* t;  // null: only S is wanted
  int64_t stride, n, inner, outer_stride;
  int count, r;
  bool plain;          // rows lie in one piece each
  bool aligned;        // and kWidth columns in one load
  bool state_aligned;  // the same of v and t

  Task() = default;
  __device__ __forceinline__ Task(const Header& header, const Matrix& m, const Tile& tile)
      : first(at<const T>(m.weight) + tile.row_begin * m.row_stride),
        v(at<const float>(header.v) + m.v_offset),
        t(header.t_partial == 0 ? nullptr : at<float>(header.t_partial) + tile.t_offset),
        stride(m.row_stride),
        n(m.outer * m.inner),
        inner(m.inner),
        outer_stride(m.outer_stride),
        count((int)(tile.row_end - tile.row_begin)),
        r((int)header.r),
        plain(m.outer == 1),
        aligned(is_aligned<T>(m.weight, stride, n, m.outer)),
        state_aligned(is_aligned(v) && is_aligned(t) && n % kWidth == 0) {}

  // Columns c to c + kWidth of a row, as they lie in memory; zeros beyond the last.
  __device__ __forceinline__ uint4 load(int row, int64_t c) const {
    const T* p = first + (int64_t)row * stride;
    if (aligned) return __ldg(reinterpret_cast<const uint4*>(p + c));
    constexpr int kPerWord = 4 / (int)sizeof(T);
    uint32_t word[4] = {};
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (c + i < n) {
        const int64_t place = plain ? c + i : column_offset(c + i, inner, outer_stride);
        word[i / kPerWord] |= bits_of(__ldg(p + place)) << (i % kPerWord * 16);
      }
    return make_uint4(word[0], word[1], word[2], word[3]);
  }

  // The same of kRows rows; those beyond the tile are its last one.
  __device__ __forceinline__ void load(int row, int64_t c, uint4 (&bits)[kRows]) const {
#pragma unroll
    for (int q = 0; q < kRows; ++q) bits[q] = load(row + q < count ? row + q : count - 1, c);
  }
};

// Products of vectors first, first + 1, ... with kRows rows, in the columns that are given by the
// first and the step of a warp; lane l gets number l / (32 / (kRows * kVectors)), row by row.
template <int kVectors, class T>
__device__ __forceinline__ float dot_rows(const Task<T>& task, int row, int first, int64_t begin,
                                          int64_t step) {
  constexpr int kWidth = Task<T>::kWidth;
  float sum[kRows * kVectors] = {};
#pragma unroll 1
  for (int64_t c = begin + threadIdx.x % 32 * kWidth; c < task.n; c += step) {
    uint4 bits[kRows];
    task.load(row, c, bits);
    float w[kRows][kWidth];
#pragma unroll
    for (int q = 0; q < kRows; ++q) unpack<T>(bits[q], w[q]);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      float x[kWidth];
      load_columns(task.v + (first + j) * task.n + c, task.n - c, task.state_aligned, x);
#pragma unroll
      for (int q = 0; q < kRows; ++q)
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum[q * kVectors + j] += w[q][i] * x[i];
    }
  }
  return sum_rows_over_warp(sum);
}

// Adds the rows of a chunk, times the factors of kVectors vectors, to kWidth columns of T; `fresh`:
// writes them over it.
template <int kVectors, class T>
__device__ __forceinline__ void add_rows(const Task<T>& task, const float (*factor)[kMaxVectors],
                                         int begin, int rows, int first, int64_t c, bool fresh) {
  constexpr int kWidth = Task<T>::kWidth;
  float sum[kVectors][kWidth] = {};
  float* const t = task.t + first * task.n + c;
  if (!fresh)
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
      load_columns(t + j * task.n, task.n - c, task.state_aligned, sum[j]);
#pragma unroll 1
  for (int row = 0; row < rows; row += kRows) {
    uint4 bits[kRows];
    task.load(begin + row, c, bits);
#pragma unroll
    for (int q = 0; q < kRows; ++q) {
      float w[kWidth];
      unpack<T>(bits[q], w);
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const float a = factor[row + q][first + j];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum[j][i] += a * w[i];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (task.state_aligned) {
      store_floats<kWidth>(t + j * task.n, true, sum[j]);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (c + i < task.n) t[j * task.n + i] = sum[j][i];
  }
}

template <class T, int kVectors>
__device__ __forceinline__ void tile_products(const Header& header, int64_t index) {
  // By row and vector, of a slice after the other: what warps found; then the first slice has S.
  __shared__ float product[kMaxChunk][kMaxVectors];
  __shared__ __align__(16) float scaled[kMaxChunk][kMaxVectors];
  __shared__ double grams[kThreads];
  __shared__ Task<T> task;  // registers are few
  constexpr int kNumbers = kRows * kVectors, kLanes = 32 / kNumbers, kWidth = kPerLoad<T>;
  const Tile tile = at<const Tile>(header.tiles)[index];
  if (!takes_part(header, tile.matrix)) return;
  const Matrix m = at<const Matrix>(header.matrices)[tile.matrix];
  if (threadIdx.x == 0) task = Task<T>(header, m, tile);
  __syncthreads();
  const Scale scale(binary_exponent(at<const float>(header.sigmas)[tile.matrix]));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = task.r;
  int chunk = kMaxChunk;
  while (chunk > kRows &&
         (chunk * task.n * (int64_t)sizeof(T) > kChunkBytes || chunk >= 2 * task.count))
    chunk /= 2;
  const int groups = chunk / kRows, slices = groups < kWarps ? kWarps / groups : 1;
  const int64_t pieces = (task.n + kWidth - 1) / kWidth;  // of a row
  float* const s = at<float>(header.s) + m.s_offset + tile.row_begin;
  // Several threads have the same pair of vectors, and different rows.
  const int pairs = r * r, pair = threadIdx.x % pairs;
  double gram = 0;
  for (int begin = 0; begin < task.count; begin += chunk) {
    const int rows = task.count - begin < chunk ? task.count - begin : chunk;
    for (int turn = warp; turn < groups * slices; turn += kWarps) {
      const int row = turn % groups * kRows, slice = turn / groups;
      if (row >= rows) continue;
      for (int first = 0; first < r; first += kVectors) {
        const float own = dot_rows<kVectors>(task, begin + row, first, slice * 32 * kWidth,
                                             (int64_t)slices * 32 * kWidth);
        if (lane % kLanes == 0)
          product[slice * chunk + row + lane / kLanes / kVectors]
                 [first + lane / kLanes % kVectors] = own;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < chunk * r; i += kThreads) {
      const int row = i % chunk, j = i / chunk;
      float sum = 0;
      if (row < rows) {
        for (int slice = 0; slice < slices; ++slice) sum += product[slice * chunk + row][j];
        s[j * m.rows + begin + row] = sum;
      }
      product[row][j] = sum;
      scaled[row][j] = scale(sum);
    }
    __syncthreads();
    for (int row = threadIdx.x / pairs; row < rows; row += kThreads / pairs)
      gram += (double)product[row][pair / r] * (double)product[row][pair % r];
    if (task.t != nullptr)
      for (int64_t i = threadIdx.x; i < pieces * (r / kVectors); i += kThreads)
        add_rows<kVectors>(task, scaled, begin, rows, (int)(i / pieces) * kVectors,
                           i % pieces * kWidth, begin == 0);
    __syncthreads();
  }
  grams[threadIdx.x] = gram;
  __syncthreads();
  if (threadIdx.x >= pairs) return;
  for (int i = pair + pairs; i < kThreads; i += pairs) gram += grams[i];
  at<double>(header.gram_partial)[index * pairs + pair] = gram;
}

// Block i < n_tiles takes tile i, the following n_elementwise blocks an elementwise parameter each.
template <class T, int kVectors>
__global__ void __launch_bounds__(kThreads, 2) subspace_kernel(const Header header) {
  const int64_t block = blockIdx.x;
  if (block >= header.n_tiles) return elementwise_norm<T>(header, block - header.n_tiles);
  tile_products<T, kVectors>(header, block);
}

template <class T>
void launch_subspace(const char* what, const Header& header, int64_t stream) {
  constexpr int kSums = 32;  // of vectors times columns, for which a thread has registers
  const auto kernel = header.r == 2   ? subspace_kernel<T, 2>
                      : header.r == 4 ? subspace_kernel<T, 4>
                                      : subspace_kernel<T, kSums / kPerLoad<T>>;
  launch<Header>(what, kernel, header.n_tiles + header.n_elementwise, kThreads, 0, stream, header);
}

}  // namespace

void subspace_products(const char* what, const Header& header, int64_t stream) {
  if (header.weight_dtype == kFloat32)
    launch_subspace<float>(what, header, stream);
  else if (header.weight_dtype == kBFloat16)
    launch_subspace<__nv_bfloat16>(what, header, stream);
  else
    launch_subspace<__half>(what, header, stream);
}

}  // namespace cuda
}  // namespace spectral
