// s = W v and t = W^T s with one read of W from memory, and the stage that adds up the tiles.
//
// Rows are taken in blocks of a few: their products with v read the block from memory, and adding
// s_r times the rows to t finds it in the cache. While that second pass runs, the next block is
// prefetched, so that memory does not idle.

#include "isa.h"
#include "scalar_math.h"
#include "simd.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

constexpr int64_t kBlockBytes = 192 * 1024;  // a row block must stay in the second-level cache
constexpr int kMaxRows = 4;

// out[r] = sum_c w[r][c] * v[c]
template <int R, class T, class S>
SPECTRAL_INLINE void dot_rows(const T* const (&w)[R], const S* v, int64_t n, S (&out)[R]) {
  using L = Simd<T>;
  using V = typename L::V;
  V even[R] = {}, odd[R] = {};
  int64_t c = 0;
  for (; c + 2 * L::kLanes <= n; c += 2 * L::kLanes) {
    const V v0 = Simd<S>::load(v + c), v1 = Simd<S>::load(v + c + L::kLanes);
    for (int r = 0; r < R; ++r) {
      even[r] += L::load(w[r] + c) * v0;
      odd[r] += L::load(w[r] + c + L::kLanes) * v1;
    }
  }
  for (; c < n; c += L::kLanes) {
    const int64_t left = n - c;
    if (left >= L::kLanes) {
      const V v0 = Simd<S>::load(v + c);
      for (int r = 0; r < R; ++r) even[r] += L::load(w[r] + c) * v0;
    } else {
      const V v0 = load_part(v + c, left);
      for (int r = 0; r < R; ++r) even[r] += load_part(w[r] + c, left) * v0;
    }
  }
  for (int r = 0; r < R; ++r) out[r] = sum_lanes(even[r] + odd[r]);
}

// t[c] = (first ? 0 : t[c]) + sum_r a[r] * w[r][c], prefetching the rows that come next
template <int R, class T, class S>
SPECTRAL_INLINE void add_rows(const T* const (&w)[R], const S (&a)[R], int64_t n, S* t, bool first,
                              const T* const (&next)[R]) {
  using L = Simd<T>;
  using V = typename L::V;
  constexpr int kUnroll = 64 / (L::kLanes * (int)sizeof(T)) > 0 ? 64 / (L::kLanes * (int)sizeof(T)) : 1;
  int64_t c = 0;
  for (; c + kUnroll * L::kLanes <= n; c += kUnroll * L::kLanes) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + c, 0, 3);
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = c + u * L::kLanes;
      V x = first ? V{} : Simd<S>::load(t + i);
      for (int r = 0; r < R; ++r) x += L::load(w[r] + i) * a[r];
      Simd<S>::store(t + i, x);
    }
  }
  for (; c < n; c += L::kLanes) {
    const int64_t left = n - c < L::kLanes ? n - c : L::kLanes;
    V x = first ? V{} : load_part(t + c, left);
    for (int r = 0; r < R; ++r) x += load_part(w[r] + c, left) * a[r];
    store_part(t + c, x, left);
  }
}

// A matrix whose rows lie in pieces (outer > 1) is gathered a row block at a time.
template <class T>
const T* gather_row(const Matrix& m, int64_t row, T* scratch) {
  const T* source = reinterpret_cast<const T*>(m.weight) + row * m.row_stride;
  for (int64_t a = 0; a < m.outer; ++a)
    __builtin_memcpy(scratch + a * m.inner, source + a * m.outer_stride, m.inner * sizeof(T));
  return scratch;
}

template <class T, class S>
struct TileTask {
  const Header& header;
  const Matrix& m;
  const Tile& tile;
  T* scratch;
  const int64_t n;
  const double scale;
  double sum_of_squares = 0;

  template <int R>
  SPECTRAL_INLINE void rows(int64_t row) {
    const T* base = reinterpret_cast<const T*>(m.weight);
    const S* v = reinterpret_cast<const S*>(header.v) + m.v_offset;
    S* s = reinterpret_cast<S*>(header.s) + m.s_offset + row;
    const T* w[R];
    const T* next[R];
    for (int r = 0; r < R; ++r) {
      w[r] = m.outer == 1 ? base + (row + r) * m.row_stride
                          : gather_row(m, row + r, scratch + r * n);
      next[r] = m.outer == 1 && row + R + r < tile.row_end ? w[r] + R * m.row_stride : w[r];
    }
    S product[R];
    dot_rows<R>(w, v, n, product);
    S scaled[R];
    for (int r = 0; r < R; ++r) {
      s[r] = product[r];
      sum_of_squares += (double)product[r] * (double)product[r];
      scaled[r] = (S)(product[r] * scale);
    }
    if (header.t_partial != 0) {
      S* t = reinterpret_cast<S*>(header.t_partial) + tile.t_offset;
      add_rows<R>(w, scaled, n, t, row == tile.row_begin, next);
    }
  }

  void run() {
    int64_t row = tile.row_begin;
    if (n * (int64_t)sizeof(T) * kMaxRows <= kBlockBytes)
      for (; row + kMaxRows <= tile.row_end; row += kMaxRows) rows<kMaxRows>(row);
    for (; row < tile.row_end; ++row) rows<1>(row);
  }
};

template <class T, class S = typename Simd<T>::Accumulator>
void gram_matvec_tile(const Header& header, const Tile& tile, void* scratch) {
  const Matrix& m = reinterpret_cast<const Matrix*>(header.matrices)[tile.matrix];
  const double sigma = reinterpret_cast<const S*>(header.sigma)[tile.matrix];
  TileTask<T, S> task{header, m, tile, static_cast<T*>(scratch), m.outer * m.inner,
                      inverse_power_of_two(sigma)};
  task.run();
  const int64_t index = &tile - reinterpret_cast<const Tile*>(header.tiles);
  reinterpret_cast<double*>(header.norm_partial)[index] = task.sum_of_squares;
}

// v_next = sum over tiles of t; returns the sum of its squares.
template <class S>
double reduce_tiles(const Header& header, const Matrix& m, S* v_next, int64_t n) {
  constexpr int kBlock = 16;
  const Tile* tiles = reinterpret_cast<const Tile*>(header.tiles) + m.first_tile;
  const S* t = reinterpret_cast<const S*>(header.t_partial);
  double squares[kBlock] = {};
  for (int64_t c = 0; c < n; c += kBlock) {
    const int width = n - c < kBlock ? (int)(n - c) : kBlock;
    S sum[kBlock] = {};
    for (int64_t i = 0; i < m.n_tiles; ++i) {
      const S* part = t + tiles[i].t_offset + c;
      if (width == kBlock)
        for (int j = 0; j < kBlock; ++j) sum[j] += part[j];
      else
        for (int j = 0; j < width; ++j) sum[j] += part[j];
    }
    for (int j = 0; j < kBlock; ++j) squares[j] += (double)sum[j] * (double)sum[j];
    for (int j = 0; j < width; ++j) v_next[c + j] = sum[j];
  }
  double total = 0;
  for (int j = 0; j < kBlock; ++j) total += squares[j];
  return total;
}

template <class S>
void normalize_matrix(const Header& header, int64_t index) {
  const Matrix& m = reinterpret_cast<const Matrix*>(header.matrices)[index];
  const int64_t n = m.outer * m.inner;
  S* sigmas = reinterpret_cast<S*>(header.sigma);
  double squares = 0;
  for (int64_t i = 0; i < m.n_tiles; ++i)
    squares += reinterpret_cast<const double*>(header.norm_partial)[m.first_tile + i];
  const double sigma = __builtin_sqrt(squares);
  const double scale = inverse_power_of_two(sigmas[index]);
  const double target = reinterpret_cast<const S*>(header.target)[index];
  const double excess = power(sigma, header.exponent) - power(target, header.exponent);
  sigmas[index] = (S)sigma;
  reinterpret_cast<S*>(header.penalty)[index] = (S)(excess * excess);
  if (header.t_partial == 0) return;

  const S* v = reinterpret_cast<const S*>(header.v) + m.v_offset;
  S* v_next = reinterpret_cast<S*>(header.v_next) + m.v_offset;
  const double t_norm = __builtin_sqrt(reduce_tiles(header, m, v_next, n));
  const bool good = is_finite(t_norm) && t_norm > 0 && is_finite(sigma);
  const double inverse = 1 / t_norm;
  for (int64_t c = 0; c < n; ++c) v_next[c] = good ? (S)(v_next[c] * inverse) : v[c];
  // ||W^T u - sigma v||^2 = ||W^T u||^2 - sigma^2
  double residual = sigma;
  if (is_finite(sigma) && sigma > 0) {
    const double wtu = t_norm / (scale * sigma);
    const double squared = (wtu - sigma) * (wtu + sigma);
    residual = squared > 0 ? __builtin_sqrt(squared) : squared <= 0 ? 0 : squared;
  }
  reinterpret_cast<S*>(header.residual)[index] = (S)residual;
}

template <class T, class S = typename Simd<T>::Accumulator>
void vector_norm_of(const Header& header, int64_t index) {
  const Vector& vector = reinterpret_cast<const Vector*>(header.vectors)[index];
  const T* x = reinterpret_cast<const T*>(vector.weight);
  const double k = header.exponent;
  double squares = 0, gains = 0;
  for (int64_t i = 0; i < vector.size; i += Simd<T>::kLanes) {
    const int64_t left = vector.size - i;
    const auto lanes = left >= Simd<T>::kLanes ? Simd<T>::load(x + i) : load_part(x + i, left);
    for (int j = 0; j < Simd<T>::kLanes; ++j) squares += (double)lanes[j] * (double)lanes[j];
    if (vector.kind == kGain)
      for (int64_t j = 0; j < Simd<T>::kLanes && j < left; ++j) {
        const double excess = power(__builtin_fabs(lanes[j]), k) - 1;
        gains += excess * excess;
      }
  }
  reinterpret_cast<S*>(header.norm)[index] = (S)__builtin_sqrt(squares);
  reinterpret_cast<S*>(header.penalty)[header.n_matrices + index] =
      (S)(vector.kind == kGain ? gains : power(squares, k));
}

}  // namespace

void gram_matvec(const Header& header, const Tile& tile, void* scratch) {
  with_dtype(header.weight_dtype,
             [&](auto t) { gram_matvec_tile<decltype(t)>(header, tile, scratch); });
}

void normalize(const Header& header, int64_t matrix) {
  if (header.weight_dtype == kFloat64)
    normalize_matrix<double>(header, matrix);
  else
    normalize_matrix<float>(header, matrix);
}

void vector_norm(const Header& header, int64_t vector) {
  with_dtype(header.weight_dtype, [&](auto t) { vector_norm_of<decltype(t)>(header, vector); });
}

}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
