// The partial results of tiles apart from s = W v: made of an s that is given, and summed up.

#include "isa.h"
#include "subspace_products.h"
#include "tile_sums.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

// t[j] = sum over the rows w of factor[row][j] * w[row] for r vectors, added to t unless it
// `starts`. W is read from memory once: a block of columns stays in the cache for all vectors, NV
// of which go through registers at a time.
template <int NV, class T, class S>
SPECTRAL_INLINE void add_group(const T* const* w, const S (*factor)[kMaxVectors], int count, int r,
                               int64_t n, S* t, bool starts) {
  for (int64_t c = 0; c < n; c += kColumns) {
    const int64_t width = n - c < kColumns ? n - c : kColumns;
    for (int j = 0; j < r; j += NV) {
      const auto a = [&](int i) {
        return reinterpret_cast<const S(*)[kMaxVectors]>(&factor[i][j]);
      };
      S* to = t + j * n;
      int i = 0;
      for (; i + kRegisterRows <= count; i += kRegisterRows)
        add_block<kRegisterRows, NV, false>(w + i, w, a(i), n, c, width, to, starts && i == 0);
      for (; i < count; ++i)
        add_block<1, NV, false>(w + i, w, a(i), n, c, width, to, starts && i == 0);
    }
  }
}

template <int NV, class T, class S = typename Simd<T>::Accumulator>
void transposed_tile(const Header& header, const Tile& tile, double* scratch) {
  const Matrix& m = reinterpret_cast<const Matrix*>(header.matrices)[tile.matrix];
  const int64_t n = m.outer * m.inner, most = m.outer == 1 ? kGroupRows : kMaxRows;
  const int r = (int)header.r;
  const double scale = inverse_power_of_two(reinterpret_cast<const S*>(header.sigma)[tile.matrix]);
  const S* s = reinterpret_cast<const S*>(header.s) + m.s_offset;
  S* t = header.t_partial == 0 ? nullptr : reinterpret_cast<S*>(header.t_partial) + tile.t_offset;
  S* own_t = Simd<T>::kSplits && t != nullptr ? reinterpret_cast<S*>(scratch + kMaxRows * n) : t;
  const int64_t index = &tile - reinterpret_cast<const Tile*>(header.tiles);
  double* gram = reinterpret_cast<double*>(header.gram_partial) + index * r * r;
  for (int i = 0; i < r * r; ++i) gram[i] = 0;
  for (int64_t row = tile.row_begin; row < tile.row_end; row += most) {
    const int count = (int)(tile.row_end - row < most ? tile.row_end - row : most);
    const T* w[kGroupRows];
    S factor[kGroupRows][kMaxVectors];
    for (int i = 0; i < count; ++i) {
      double wide[kMaxVectors];
      for (int j = 0; j < r; ++j) {
        wide[j] = s[j * m.rows + row + i];
        factor[i][j] = (S)(wide[j] * scale);
      }
      for (int j = 0; j < r; ++j)
        for (int k = 0; k < r; ++k) gram[j * r + k] += wide[j] * wide[k];
      if (t == nullptr) continue;
      w[i] = m.outer == 1 ? reinterpret_cast<const T*>(m.weight) + (row + i) * m.row_stride
                          : gather_row(m, row + i, reinterpret_cast<T*>(scratch) + i * n);
    }
    if (t != nullptr) add_group<NV>(w, factor, count, r, n, own_t, row == tile.row_begin);
  }
  if (own_t != t)
    for (int j = 0; j < r; ++j) memory_order<T>(own_t + j * n, t + j * n, n);
}

// The share of a tile in the sums of t over its matrix: some of the columns.
template <class S>
void collect_columns(const Header& header, int64_t index, S* t) {
  const Tile& tile = reinterpret_cast<const Tile*>(header.tiles)[index];
  const Matrix& m = reinterpret_cast<const Matrix*>(header.matrices)[tile.matrix];
  const int64_t size = header.r * m.outer * m.inner, blocks = (size + kBlock - 1) / kBlock;
  const int64_t share = (blocks + m.n_tiles - 1) / m.n_tiles * kBlock;
  const int64_t begin = (index - m.first_tile) * share;
  const int64_t n = size - begin < share ? size - begin : share;
  if (n > 0) reduce_tiles(header, m, begin, t + m.v_offset + begin, n);
}

// The products of one matrix, and zeros for t where it has no tile.
template <class S>
void collect_products(const Header& header, int64_t index, S* t, double* gram) {
  const Matrix& m = reinterpret_cast<const Matrix*>(header.matrices)[index];
  const int64_t size = header.r * header.r;
  const double* partial = reinterpret_cast<const double*>(header.gram_partial);
  for (int64_t j = 0; j < size; ++j) {
    double sum = 0;
    for (int64_t i = 0; i < m.n_tiles; ++i) sum += partial[(m.first_tile + i) * size + j];
    gram[index * size + j] = sum;
  }
  if (m.n_tiles == 0 && t != nullptr)
    for (int64_t c = 0; c < header.r * m.outer * m.inner; ++c) t[m.v_offset + c] = 0;
}

template <class S>
void collect_one(const Header& header, int64_t index, S* t, double* gram) {
  if (index >= header.n_tiles)
    collect_products(header, index - header.n_tiles, t, gram);
  else if (t != nullptr)
    collect_columns(header, index, t);
}

}  // namespace

void transposed(const Header& header, const Tile& tile, double* scratch) {
  with_dtype(header.weight_dtype, [&](auto type) {
    using T = decltype(type);
    if (!takes_part<typename Simd<T>::Accumulator>(header, tile.matrix)) return;
    if (header.r == 1)
      transposed_tile<1, T>(header, tile, scratch);
    else if (header.r == 2)
      transposed_tile<2, T>(header, tile, scratch);
    else
      transposed_tile<4, T>(header, tile, scratch);
  });
}

void collect(const Header& header, int64_t index, int64_t t, int64_t gram) {
  double* products = reinterpret_cast<double*>(gram);
  if (header.weight_dtype == kFloat64)
    collect_one(header, index, reinterpret_cast<double*>(t), products);
  else
    collect_one(header, index, reinterpret_cast<float*>(t), products);
}

}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
