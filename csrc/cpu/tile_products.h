// The products of a tile: s = W v and t = W^T s with one read of W from memory.
//
// Rows are taken in blocks of a few: their products with v read the block from memory, and adding
// s_r times the rows to t finds it in the cache. Both passes can prefetch half of the rows that
// come some blocks later, so that memory does not idle. An update hands over its rows vector by
// vector instead, while they are in the first-level cache.
#pragma once

#include "scalar_math.h"
#include "subspace_products.h"
#include "tiles.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

constexpr int64_t kBlockBytes = 192 * 1024;  // a row block must stay in the second-level cache
constexpr int64_t kAheadBytes = 8 * 1024;    // how far at least the prefetching runs ahead

// out[r] = sum_c w[r][c] * v[c]; kPrefetch: fetch the first half of the rows that come later
template <int R, bool kPrefetch, class T, class S>
SPECTRAL_INLINE void dot_rows(const T* const (&w)[R], const S* v, int64_t n, S (&out)[R],
                              const T* const (&later)[R]) {
  using L = Simd<T>;
  using V = typename L::V;
  V even[R] = {}, odd[R] = {};
  int64_t c = for_pairs<T>(n, [&](int64_t c, bool prefetch) __attribute__((always_inline)) {
    const V v0 = Simd<S>::load(v + c), v1 = Simd<S>::load(v + c + L::kLanes);
    for (int r = 0; r < R; ++r) {
      if (kPrefetch && prefetch && r < R / 2) prefetch_pair(later[r] + c);
      V w0, w1;
      L::load_pair(w[r] + c, w0, w1);
      even[r] = fused(w0, v0, even[r]);
      odd[r] = fused(w1, v1, odd[r]);
    }
  });
  if (c + L::kLanes <= n) {
    const V v0 = Simd<S>::load(v + c);
    for (int r = 0; r < R; ++r) even[r] = fused(L::load(w[r] + c), v0, even[r]);
    c += L::kLanes;
  }
  if (c < n) {
    const Tail<T> tail(n, c);
    const V v0 = tail.load_all(v);
    for (int r = 0; r < R; ++r) odd[r] = fused(tail.load(w[r]), v0, odd[r]);
  }
  for (int r = 0; r < R; ++r) out[r] = sum_lanes(even[r] + odd[r]);
}

// t[c] = (first ? 0 : t[c]) + sum_r a[r] * w[r][c]; kPrefetch: fetch the other half
template <int R, bool kPrefetch, class T, class S>
SPECTRAL_INLINE void add_rows(const T* const (&w)[R], const S (&a)[R], int64_t n, S* t, bool first,
                              const T* const (&later)[R]) {
  using L = Simd<T>;
  using V = typename L::V;
  int64_t c = for_pairs<T>(n, [&](int64_t c, bool prefetch) __attribute__((always_inline)) {
    V x0 = first ? V{} : Simd<S>::load(t + c), x1 = first ? V{} : Simd<S>::load(t + c + L::kLanes);
    for (int r = 0; r < R; ++r) {
      if (kPrefetch && prefetch && r >= R / 2) prefetch_pair(later[r] + c);
      V w0, w1;
      L::load_pair(w[r] + c, w0, w1);
      x0 = fused(w0, a[r], x0);
      x1 = fused(w1, a[r], x1);
    }
    Simd<S>::store(t + c, x0);
    Simd<S>::store(t + c + L::kLanes, x1);
  });
  if (c + L::kLanes <= n) {
    V x = first ? V{} : Simd<S>::load(t + c);
    for (int r = 0; r < R; ++r) x = fused(L::load(w[r] + c), a[r], x);
    Simd<S>::store(t + c, x);
    c += L::kLanes;
  }
  if (c < n) {
    const Tail<T> tail(n, c);
    V x = first ? tail.load_before(t) : tail.load_all(t);
    for (int r = 0; r < R; ++r) x = fused(tail.load(w[r]), a[r], x);
    tail.store(t, x);
  }
}

// The products of a row that an update hands over vector by vector, right after it has stored them:
// the row times v, and the row before it, which is still in the cache, into t. The sums are those
// of dot_rows and add_rows, in the same order.
template <class T>
struct RowProducts {
  using L = Simd<T>;
  using S = typename L::Accumulator;
  using V = typename L::V;
  const S* v;  // in split order if the type needs it
  S* t;        // the same
  const T* before;
  S a = 0;  // what goes with the row before; the first one has none
  V even{}, odd{};

  SPECTRAL_INLINE void pair(const T* row, int64_t c) {
    V w0, w1;
    L::load_pair(row + c, w0, w1);
    even = fused(w0, Simd<S>::load(v + c), even);
    odd = fused(w1, Simd<S>::load(v + c + L::kLanes), odd);
    L::load_pair(before + c, w0, w1);
    Simd<S>::store(t + c, fused(w0, a, Simd<S>::load(t + c)));
    Simd<S>::store(t + c + L::kLanes, fused(w1, a, Simd<S>::load(t + c + L::kLanes)));
  }

  SPECTRAL_INLINE void one(const T* row, int64_t c) {
    even = fused(L::load(row + c), Simd<S>::load(v + c), even);
    Simd<S>::store(t + c, fused(L::load(before + c), a, Simd<S>::load(t + c)));
  }

  SPECTRAL_INLINE void part(const T* row, int64_t c, int64_t n) {
    const Tail<T> tail(n, c);
    odd = fused(tail.load(row), tail.load_all(v), odd);
    tail.store(t, fused(tail.load(before), a, tail.load_all(t)));
  }

  // The row times v, of which all vectors have been handed over; the next row follows.
  SPECTRAL_INLINE S next_row(const T* row, double scale) {
    const S product = sum_lanes(even + odd);
    even = odd = V{};
    before = row;
    a = (S)(product * scale);
    return product;
  }
};

// Writes s, the partial t and the sum of squares of a tile of a matrix with one vector and rows in
// one piece, v_next being the vector. update(row, products) updates a row and hands it over.
template <class T, class UpdateRow>
SPECTRAL_INLINE void products_along(const Header& header, const Tile& tile, const Scratch& scratch,
                                    UpdateRow update) {
  using S = typename Simd<T>::Accumulator;
  const Matrix& m = reinterpret_cast<const Matrix*>(header.matrices)[tile.matrix];
  const int64_t n = m.inner;
  const double sigma = reinterpret_cast<const S*>(header.sigmas)[tile.matrix];
  const double scale = inverse_power_of_two(sigma);
  const S* v = reinterpret_cast<const S*>(header.v_next) + m.v_offset;
  S* s = reinterpret_cast<S*>(header.s) + m.s_offset;
  S* t = reinterpret_cast<S*>(header.t_partial) + tile.t_offset;
  if constexpr (Simd<T>::kSplits) {
    split_order<T>(v, scratch.v, n);
    v = scratch.v;
  }
  __builtin_memset(t, 0, n * sizeof(S));
  const T* row = reinterpret_cast<const T*>(m.weight) + tile.row_begin * m.row_stride;
  RowProducts<T> products{v, t, row};
  double sum_of_squares = 0;
  for (int64_t i = tile.row_begin; i < tile.row_end; ++i, row += m.row_stride) {
    update(i, products);
    const double product = s[i] = products.next_row(row, scale);
    sum_of_squares = fused(product, product, sum_of_squares);
  }
  const T* const last[] = {products.before};
  add_rows<1, false>(last, {products.a}, n, t, false, last);
  if (Simd<T>::kSplits) memory_order<T>(t, n);
  const int64_t index = &tile - reinterpret_cast<const Tile*>(header.tiles);
  reinterpret_cast<double*>(header.gram_partial)[index] = sum_of_squares;
}

// before(row) is called for every row before it is read.
template <class T, bool kPrefetch, class S, class Before>
struct TileTask {
  const Matrix& m;
  const Tile& tile;
  const int64_t n;
  const double scale;
  const S* v;  // in split order if the type needs it
  S* s;
  S* t;           // the same; null: only s is wanted
  T* gathered;    // scratch for kMaxRows rows
  const T* next;  // what this thread will probably read next; null: unknown
  Before before;
  double sum_of_squares = 0;
  int64_t ahead = 0;  // rows between the current and the prefetched ones

  template <int R>
  SPECTRAL_INLINE void rows(int64_t row) {
    const T* base = reinterpret_cast<const T*>(m.weight);
    const T* w[R];
    const T* later[R];
    for (int r = 0; r < R; ++r) {
      before(row + r);
      w[r] =
          m.outer == 1 ? base + (row + r) * m.row_stride : gather_row(m, row + r, gathered + r * n);
      const int64_t beyond = row + ahead + r - tile.row_end;
      if (beyond < 0 && m.outer == 1)
        later[r] = w[r] + ahead * m.row_stride;
      else
        later[r] = beyond >= 0 && next != nullptr ? next + beyond * n : w[r];
    }
    S product[R], scaled[R];
    dot_rows<R, kPrefetch>(w, v, n, product, later);
    for (int r = 0; r < R; ++r) {
      s[row + r] = product[r];
      sum_of_squares = fused((double)product[r], (double)product[r], sum_of_squares);
      scaled[r] = (S)(product[r] * scale);
    }
    if (t != nullptr) add_rows<R, kPrefetch>(w, scaled, n, t, row == tile.row_begin, later);
  }

  void run() {
    int64_t row = tile.row_begin;
    ahead = kMaxRows * (1 + kAheadBytes / (kMaxRows * n * (int64_t)sizeof(T)));
    if (n * (int64_t)sizeof(T) * kMaxRows <= kBlockBytes)
      for (; row + kMaxRows <= tile.row_end; row += kMaxRows) rows<kMaxRows>(row);
    for (; row < tile.row_end; ++row) rows<1>(row);
  }
};

// Separate, so that the code for one vector is optimized on its own.
template <class T, bool kPrefetch, class S>
__attribute__((noinline)) void products_of_several(const Header& header, const Tile& tile,
                                                   const T* next, const S* v,
                                                   const Scratch& scratch, RowFunction before) {
  if (header.r == 2)
    subspace_products<2, T, kPrefetch>(header, tile, next, v, scratch, before);
  else
    subspace_products<4, T, kPrefetch>(header, tile, next, v, scratch, before);
}

// Writes s, the partial t and the partial Gram matrix of a tile; v is v or v_next of the header.
template <class T, bool kPrefetch = true, class S, class Before>
SPECTRAL_INLINE void tile_products(const Header& header, const Tile& tile, const Tile* next,
                                   const S* v, const Scratch& scratch, Before before) {
  const Matrix* matrices = reinterpret_cast<const Matrix*>(header.matrices);
  const Matrix& m = matrices[tile.matrix];
  const T* following = nullptr;
  if (next != nullptr) {
    const Matrix& its = matrices[next->matrix];
    following = reinterpret_cast<const T*>(its.weight) + next->row_begin * its.row_stride;
  }
  if (header.r > 1)
    return products_of_several<T, kPrefetch>(header, tile, following, v, scratch,
                                             RowFunction(before));
  const int64_t n = m.outer * m.inner;
  const double sigma = reinterpret_cast<const S*>(header.sigmas)[tile.matrix];
  v += m.v_offset;
  S* s = reinterpret_cast<S*>(header.s) + m.s_offset;
  S* t = header.t_partial == 0 ? nullptr : reinterpret_cast<S*>(header.t_partial) + tile.t_offset;
  if constexpr (Simd<T>::kSplits) {
    split_order<T>(v, scratch.v, n);
    v = scratch.v;
  }
  TileTask<T, kPrefetch, S, Before> task{m,         tile,  n, inverse_power_of_two(sigma),
                                         v,         s,     t, reinterpret_cast<T*>(scratch.rows),
                                         following, before};
  task.run();
  if (Simd<T>::kSplits && t != nullptr) memory_order<T>(t, n);
  const int64_t index = &tile - reinterpret_cast<const Tile*>(header.tiles);
  reinterpret_cast<double*>(header.gram_partial)[index] = task.sum_of_squares;
}

}  // namespace
}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
