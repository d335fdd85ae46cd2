// Partial results of tiles without s = W v: computed from a given s, and summed over tiles.

#include "isa.h"
#include "tile_products.h"
#include "tiles.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

// Inputs and outputs of the partial results of a tile.
template <class T, class S = typename Simd<T>::Accumulator>
struct Given {
  const Matrix& m;
  const Tile& tile;
  const int64_t n, r;
  const double scale;
  const S* s;    // [r, rows]
  S* t;          // [r, n], in split order until the end; null: only gram is wanted
  double* gram;  // [r, r]
  T* gathered;   // scratch for kMaxRows rows

  Given(const Header& header, const Tile& tile, const Scratch& scratch)
      : m(reinterpret_cast<const Matrix*>(header.matrices)[tile.matrix]),
        tile(tile),
        n(m.outer * m.inner),
        r(header.r),
        scale(inverse_power_of_two(reinterpret_cast<const S*>(header.sigmas)[tile.matrix])),
        s(reinterpret_cast<const S*>(header.s) + m.s_offset),
        t(header.t_partial == 0 ? nullptr : reinterpret_cast<S*>(header.t_partial) + tile.t_offset),
        gram(reinterpret_cast<double*>(header.gram_partial) +
             (&tile - reinterpret_cast<const Tile*>(header.tiles)) * r * r),
        gathered(reinterpret_cast<T*>(scratch.rows)) {}

  // The i-th of a few rows together.
  SPECTRAL_INLINE const T* row(int64_t row, int i) const {
    return m.outer == 1 ? reinterpret_cast<const T*>(m.weight) + row * m.row_stride
                        : gather_row(m, row, gathered + i * n);
  }

  void end() const {
    if (Simd<T>::kSplits && t != nullptr)
      for (int64_t j = 0; j < r; ++j) memory_order<T>(t + j * n, n);
  }
};

// One vector: R rows, starting at the given one.
template <int R, class T, class S>
SPECTRAL_INLINE void add_few(const Given<T, S>& given, int64_t row) {
  const T* w[R];
  S factor[R];
  for (int i = 0; i < R; ++i) {
    const double wide = given.s[row + i];
    *given.gram = fused(wide, wide, *given.gram);
    factor[i] = (S)(wide * given.scale);
    if (given.t != nullptr) w[i] = given.row(row + i, i);
  }
  const bool first = row == given.tile.row_begin;
  if (given.t != nullptr) add_rows<R, false>(w, factor, given.n, given.t, first, w);
}

template <class T>
void transposed_of_one(const Header& header, const Tile& tile, const Scratch& scratch) {
  const Given<T> given(header, tile, scratch);
  *given.gram = 0;
  int64_t row = tile.row_begin;
  for (; row + kMaxRows <= tile.row_end; row += kMaxRows) add_few<kMaxRows>(given, row);
  for (; row < tile.row_end; ++row) add_few<1>(given, row);
  given.end();
}

// Several vectors: t[j] += sum over the rows w of factor[row][j] * w[row], or overwritten for
// the first rows. W is read from memory once: a block of columns stays in the cache for all
// vectors, NV of which go through registers at a time.
template <int NV, class T, class S>
SPECTRAL_INLINE void add_group(const Given<T, S>& given, const T* const* w,
                               const S (*factor)[kMaxVectors], int count, bool first) {
  const int64_t n = given.n;
  for (int64_t c = 0; c < n; c += kColumns) {
    const int64_t width = n - c < kColumns ? n - c : kColumns;
    for (int64_t j = 0; j < given.r; j += NV) {
      const auto a = [&](int i) {
        return reinterpret_cast<const S(*)[kMaxVectors]>(&factor[i][j]);
      };
      S* t = given.t + j * n;
      int i = 0;
      for (; i + kRegisterRows <= count; i += kRegisterRows)
        add_block<kRegisterRows, NV, false>(w + i, w, a(i), n, c, width, t, first && i == 0);
      for (; i < count; ++i)
        add_block<1, NV, false>(w + i, w, a(i), n, c, width, t, first && i == 0);
    }
  }
}

template <int NV, class T, class S = typename Simd<T>::Accumulator>
void transposed_of_several(const Header& header, const Tile& tile, const Scratch& scratch) {
  const Given<T> given(header, tile, scratch);
  const int r = (int)given.r;
  const int64_t most = given.m.outer == 1 ? kGroupRows : kMaxRows;
  for (int i = 0; i < r * r; ++i) given.gram[i] = 0;
  for (int64_t row = tile.row_begin; row < tile.row_end; row += most) {
    const int count = (int)(tile.row_end - row < most ? tile.row_end - row : most);
    const T* w[kGroupRows];
    S factor[kGroupRows][kMaxVectors];
    for (int i = 0; i < count; ++i) {
      double wide[kMaxVectors];
      for (int j = 0; j < r; ++j) {
        wide[j] = given.s[j * given.m.rows + row + i];
        factor[i][j] = (S)(wide[j] * given.scale);
      }
      for (int j = 0; j < r; ++j)
        for (int k = 0; k < r; ++k)
          given.gram[j * r + k] = fused(wide[j], wide[k], given.gram[j * r + k]);
      if (given.t != nullptr) w[i] = given.row(row + i, i);
    }
    if (given.t != nullptr) add_group<NV>(given, w, factor, count, row == tile.row_begin);
  }
  given.end();
}

// Sums t over the tiles of a matrix, for the columns that this tile is responsible for.
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

// Sums the products of one matrix; writes zeros to t if it has no tile.
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

void transposed(const Header& header, const Tile& tile, const Scratch& scratch) noexcept {
  with_dtype(header.weight_dtype, [&](auto type) {
    using T = decltype(type);
    if (!takes_part<typename Simd<T>::Accumulator>(header, tile.matrix)) return;
    if (header.r == 1)
      transposed_of_one<T>(header, tile, scratch);
    else if (header.r == 2)
      transposed_of_several<2, T>(header, tile, scratch);
    else
      transposed_of_several<4, T>(header, tile, scratch);
  });
}

void collect(const Header& header, int64_t index, int64_t t, int64_t gram) noexcept {
  double* products = reinterpret_cast<double*>(gram);
  if (header.weight_dtype == kFloat64)
    collect_one(header, index, reinterpret_cast<double*>(t), products);
  else
    collect_one(header, index, reinterpret_cast<float*>(t), products);
}

}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
