// Partial results of tiles without s = W v: computed from a given s, and summed over tiles.

#include "backend.h"
#include "chunks.cuh"
#include "launch.h"
#include "rows.cuh"

namespace spectral {
namespace cuda {
namespace {

constexpr int kRows = 8;      // whose loads are in flight per thread
constexpr int kFactors = 64;  // rows whose factors are in shared memory
constexpr int kMaxSlices = kFactors / kRows;
constexpr int kCollectThreads = 64;

// W^T s of kVectors vectors at a time. A thread owns columns, of short rows beside others that have
// different rows of the same columns: these slices are added up in their order.
template <int kVectors, int kTotal, class Source>
__device__ __forceinline__ void add_rows(const Source& w, const float* s, int64_t n_rows, int r,
                                         Scale scale, float (&factor)[kFactors][kVectors],
                                         float (&total)[kTotal], float* t) {
  constexpr int kWidth = Source::kWidth;
  static_assert(kTotal >= kThreads / 2 * kWidth * kVectors);
  const bool aligned = is_aligned(t) && w.n % kWidth == 0;
  int side = kThreads, slices = 1;
  for (; slices < kMaxSlices && side / 2 * kWidth >= w.n; side /= 2) slices *= 2;
  const int place = threadIdx.x % side, slice = threadIdx.x / side;
  for (int64_t strip = 0; strip < w.n; strip += side * kWidth)
    for (int first = 0; first < r; first += kVectors) {
      const int64_t c = strip + place * kWidth;
      float sum[kVectors][kWidth] = {};
#pragma unroll 1
      for (int begin = 0; begin < w.count; begin += kFactors) {
        __syncthreads();
        for (int i = threadIdx.x; i < kFactors * kVectors; i += kThreads) {
          const int row = begin + i % kFactors, j = i / kFactors;
          factor[i % kFactors][j] = row < w.count ? scale(s[(first + j) * n_rows + row]) : 0;
        }
        __syncthreads();
        if (c >= w.n) continue;
#pragma unroll 1
        for (int row = slice * kRows; row < kFactors && begin + row < w.count;
             row += slices * kRows) {
          typename Source::Bits bits[kRows];
          w.template load<kRows>(begin + row, c, [&](int q, auto own) { bits[q] = own; });
#pragma unroll
          for (int q = 0; q < kRows; ++q) {
            float x[kWidth];
            unpack<typename Source::Element>(bits[q], x);
#pragma unroll
            for (int j = 0; j < kVectors; ++j)
#pragma unroll
              for (int i = 0; i < kWidth; ++i) sum[j][i] += factor[row + q][j] * x[i];
          }
        }
      }
      for (int turn = 0; turn < slices; ++turn) {
        const bool is_last = turn == slices - 1;
        if (slice == turn && c < w.n)
#pragma unroll
          for (int j = 0; j < kVectors; ++j) {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
              float& before = total[(j * kWidth + i) * side + place];
              if (turn > 0) sum[j][i] += before;
              if (!is_last) before = sum[j][i];
            }
            if (is_last) store_floats<kWidth>(t + (first + j) * w.n + c, aligned, sum[j]);
          }
        if (slices > 1) __syncthreads();
      }
    }
}

// s s^T over the rows of a tile: several threads have the same pair of vectors, and different rows.
__device__ __forceinline__ void products(const float* s, int64_t n_rows, int count, int r,
                                         double* gram) {
  __shared__ double partial[kThreads];
  const int pairs = r * r, pair = threadIdx.x % pairs;
  double sum = 0;
  for (int row = threadIdx.x / pairs; row < count; row += kThreads / pairs)
    sum += (double)s[pair / r * n_rows + row] * (double)s[pair % r * n_rows + row];
  for (int distance = 16; distance >= pairs; distance /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= pairs) return;
  const int step = pairs > 32 ? pairs : 32;
  for (int i = threadIdx.x + step; i < kThreads; i += step) sum += partial[i];
  gram[pair] = sum;
}

// Block i takes tile i.
template <class T, int kVectors>
__global__ void __launch_bounds__(kThreads, 2) transposed_kernel(const Header header) {
  __shared__ __align__(16) float factor[kFactors][kVectors];
  __shared__ float total[kThreads / 2 * kPerLoad<T> * kVectors];
  const Tile tile = at<const Tile>(header.tiles)[blockIdx.x];
  if (!takes_part(header, tile.matrix)) return;
  const Matrix m = at<const Matrix>(header.matrices)[tile.matrix];
  const int r = (int)header.r;
  const float* s = at<const float>(header.s) + m.s_offset + tile.row_begin;
  if (header.t_partial != 0) {
    float* t = at<float>(header.t_partial) + tile.t_offset;
    const Scale scale(binary_exponent(at<const float>(header.sigmas)[tile.matrix]));
    if (is_aligned<T>(m.weight, m.row_stride, m.outer * m.inner, m.outer))
      add_rows<kVectors>(Rows<T, true>(m, tile), s, m.rows, r, scale, factor, total, t);
    else
      add_rows<kVectors>(Rows<T, false>(m, tile), s, m.rows, r, scale, factor, total, t);
  }
  products(s, m.rows, (int)(tile.row_end - tile.row_begin), r,
           at<double>(header.gram_partial) + (int64_t)blockIdx.x * r * r);
}

template <class T>
void launch_transposed(const Header& header, int64_t stream) {
  constexpr int kMost = 32 / kPerLoad<T>;  // a thread has registers for 32 sums
  const auto kernel = header.r == 1   ? transposed_kernel<T, 1>
                      : header.r == 2 ? transposed_kernel<T, 2>
                      : header.r == 4 ? transposed_kernel<T, 4>
                                      : transposed_kernel<T, kMost>;
  launch<Header>("transposed", kernel, header.n_tiles, kThreads, 0, stream, header);
}

struct Sums {
  int64_t t, gram;  // addresses; t may be 0
};

// Sums t over the tiles of a matrix, for the columns that this tile is responsible for.
__device__ __forceinline__ void collect_columns(const Header& header, int64_t index, float* sums) {
  const Tile* tiles = at<const Tile>(header.tiles);
  const Matrix m = at<const Matrix>(header.matrices)[tiles[index].matrix];
  const float* t = at<const float>(header.t_partial) + tiles[m.first_tile].t_offset;
  const int64_t size = header.r * m.outer * m.inner;
  const int64_t share = (size + m.n_tiles - 1) / m.n_tiles;
  const int64_t begin = (index - m.first_tile) * share;
  const int64_t end = begin + share < size ? begin + share : size;
  for (int64_t c = begin + threadIdx.x; c < end; c += kCollectThreads) {
    float sum = 0;
#pragma unroll 8
    for (int64_t i = 0; i < m.n_tiles; ++i) sum += t[i * size + c];
    sums[m.v_offset + c] = sum;
  }
}

// Sums the products of one matrix; writes zeros to t if it has no tile.
__device__ __forceinline__ void collect_products(const Header& header, int64_t index,
                                                 const Sums& sums) {
  const Matrix m = at<const Matrix>(header.matrices)[index];
  const int64_t pairs = header.r * header.r;
  const double* partial = at<const double>(header.gram_partial) + m.first_tile * pairs;
  for (int64_t j = threadIdx.x; j < pairs; j += kCollectThreads) {
    double sum = 0;
#pragma unroll 8
    for (int64_t i = 0; i < m.n_tiles; ++i) sum += partial[i * pairs + j];
    at<double>(sums.gram)[index * pairs + j] = sum;
  }
  if (m.n_tiles > 0 || sums.t == 0) return;
  for (int64_t c = threadIdx.x; c < header.r * m.outer * m.inner; c += kCollectThreads)
    at<float>(sums.t)[m.v_offset + c] = 0;
}

// With several vectors. Block i < n_tiles takes columns of the matrix of tile i if there is a t,
// the following ones the products of a matrix each.
__global__ void collect_kernel(const Header header, Sums sums) {
  int64_t block = blockIdx.x;
  if (sums.t != 0) {
    if (block < header.n_tiles) return collect_columns(header, block, at<float>(sums.t));
    block -= header.n_tiles;
  }
  collect_products(header, block, sums);
}

// With one vector, whose tiles may be many. Block i takes chunk i, the first one of a matrix its
// products as well.
__global__ void __launch_bounds__(kThreads, 2)
    collect_chunks_kernel(const Header header, Sums sums) {
  const Chunk chunk = at<const Chunk>(header.chunks)[blockIdx.x];
  const Matrix m = at<const Matrix>(header.matrices)[chunk.matrix];
  if (sums.t != 0) {
    const float sum = sum_of_tiles(header, m, chunk.begin);
    const int64_t c = chunk.begin + threadIdx.x;
    if (threadIdx.x < kChunkColumns && c < m.outer * m.inner)
      at<float>(sums.t)[m.v_offset + c] = sum;
  }
  if (chunk.begin > 0) return;
  const double squares = sum_of_squares(header, m);
  if (threadIdx.x == 0) at<double>(sums.gram)[chunk.matrix] = squares;
}

}  // namespace

void transposed(const Header& header, int device, int64_t stream) {
  check_dtype(header, "transposed");
  if (header.n_tiles == 0) return;
  const DeviceGuard guard(device, "transposed");
  if (header.weight_dtype == kFloat32)
    launch_transposed<float>(header, stream);
  else if (header.weight_dtype == kBFloat16)
    launch_transposed<__nv_bfloat16>(header, stream);
  else
    launch_transposed<__half>(header, stream);
}

void collect(const Header& header, int64_t t, int64_t gram, int device, int64_t stream) {
  check_dtype(header, "collect");
  if (header.n_matrices == 0) return;
  const DeviceGuard guard(device, "collect");
  if (header.r == 1)
    return launch<Header, Sums>("collect", collect_chunks_kernel, header.n_chunks, kThreads, 0,
                                stream, header, Sums{t, gram});
  launch<Header, Sums>("collect", collect_kernel, (t != 0 ? header.n_tiles : 0) + header.n_matrices,
                       kCollectThreads, 0, stream, header, Sums{t, gram});
}

}  // namespace cuda
}  // namespace spectral
