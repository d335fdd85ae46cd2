// The products of a tile with several vectors: S = V W^T and T = S W with one read of W from
// memory.
//
// Rows are taken in groups that stay in the second-level cache, their columns in blocks for which
// V and T stay in the first-level one; a few rows times a few vectors are in registers at a time.
#pragma once

#include "scalar_math.h"
#include "tiles.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

constexpr int kGroupRows = 16;
constexpr int64_t kGroupBytes = 96 * 1024;  // of W: two groups, V and T share the cache
constexpr int64_t kColumns = 1024;          // of a block, a whole number of pairs
// With 16 registers, two rows times four vectors leave room for the operands.
constexpr int kRegisterRows = SPECTRAL_BYTES == 64 ? 4 : 2;

// out[r][j] += sum of w[r][c] * v[j][c] over a block of columns from begin on; the last one has the
// tail. kPrefetch: fetch the first half of the rows that come later.
template <int R, int NV, bool kPrefetch, class T, class S>
SPECTRAL_INLINE void dot_block(const T* const* w, const T* const* later, const S* v, int64_t n,
                               int64_t begin, int64_t width, S (*out)[kMaxVectors]) {
  using L = Simd<T>;
  using V = typename L::V;
  V sum[R][NV] = {};
  int64_t c = begin + for_pairs<T>(width, [&](int64_t i, bool line) __attribute__((always_inline)) {
                const int64_t c = begin + i;
                V w0[R], w1[R];
                for (int r = 0; r < R; ++r) {
                  if (kPrefetch && line && 2 * r < R) prefetch_pair(later[r] + c);
                  L::load_pair(w[r] + c, w0[r], w1[r]);
                }
                for (int j = 0; j < NV; ++j) {
                  const V v0 = Simd<S>::load(v + j * n + c),
                          v1 = Simd<S>::load(v + j * n + c + L::kLanes);
                  for (int r = 0; r < R; ++r) {
                    sum[r][j] = fused(w0[r], v0, sum[r][j]);
                    sum[r][j] = fused(w1[r], v1, sum[r][j]);
                  }
                }
              });
  if (begin + width == n) {
    if (c + L::kLanes <= n) {
      for (int j = 0; j < NV; ++j)
        for (int r = 0; r < R; ++r)
          sum[r][j] = fused(L::load(w[r] + c), Simd<S>::load(v + j * n + c), sum[r][j]);
      c += L::kLanes;
    }
    if (c < n) {
      const Tail<T> tail(n, c);
      for (int j = 0; j < NV; ++j) {
        const V x = tail.load_all(v + j * n);
        for (int r = 0; r < R; ++r) sum[r][j] = fused(tail.load(w[r]), x, sum[r][j]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < NV; ++j) out[r][j] += sum_lanes(sum[r][j]);
}

// t[j][c] = (first ? 0 : t[j][c]) + sum over r of a[r][j] * w[r][c], for a block of columns.
// kPrefetch: fetch the other half.
template <int R, int NV, bool kPrefetch, class T, class S>
SPECTRAL_INLINE void add_block(const T* const* w, const T* const* later, const S (*a)[kMaxVectors],
                               int64_t n, int64_t begin, int64_t width, S* t, bool first) {
  using L = Simd<T>;
  using V = typename L::V;
  S factor[R][NV];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < NV; ++j) factor[r][j] = a[r][j];
  int64_t c = begin + for_pairs<T>(width, [&](int64_t i, bool line) __attribute__((always_inline)) {
                const int64_t c = begin + i;
                V w0[R], w1[R];
                for (int r = 0; r < R; ++r) {
                  if (kPrefetch && line && 2 * r >= R) prefetch_pair(later[r] + c);
                  L::load_pair(w[r] + c, w0[r], w1[r]);
                }
                for (int j = 0; j < NV; ++j) {
                  S* to = t + j * n + c;
                  V x0 = first ? V{} : Simd<S>::load(to),
                    x1 = first ? V{} : Simd<S>::load(to + L::kLanes);
                  for (int r = 0; r < R; ++r) {
                    x0 = fused(w0[r], factor[r][j], x0);
                    x1 = fused(w1[r], factor[r][j], x1);
                  }
                  Simd<S>::store(to, x0);
                  Simd<S>::store(to + L::kLanes, x1);
                }
              });
  if (begin + width < n) return;
  if (c + L::kLanes <= n) {
    for (int j = 0; j < NV; ++j) {
      S* to = t + j * n + c;
      V x = first ? V{} : Simd<S>::load(to);
      for (int r = 0; r < R; ++r) x = fused(L::load(w[r] + c), factor[r][j], x);
      Simd<S>::store(to, x);
    }
    c += L::kLanes;
  }
  if (c < n) {
    const Tail<T> tail(n, c);
    for (int j = 0; j < NV; ++j) {
      V x = first ? tail.load_before(t + j * n) : tail.load_all(t + j * n);
      for (int r = 0; r < R; ++r) x = fused(tail.load(w[r]), factor[r][j], x);
      tail.store(t + j * n, x);
    }
  }
}

// A type-erased function of a row, so that its callers are compiled once.
struct RowFunction {
  void (*call)(const void* function, int64_t row);
  const void* function;

  template <class Function>
  explicit RowFunction(const Function& of)
      : call([](const void* f, int64_t row) { (*static_cast<const Function*>(f))(row); }),
        function(&of) {}
  void operator()(int64_t row) const { call(function, row); }
};

// before(row) is called for every row before it is read. NV vectors go through
// registers at a time.
template <int NV, class T, bool kPrefetch, class S>
struct SubspaceTask {
  const Matrix& m;
  const Tile& tile;
  const int64_t n;
  const int r;
  const double scale;
  const S* v;     // [r, n], in split order if the type needs it
  S* s;           // [r, rows]
  S* t;           // [r, n] as v; null: only s is wanted
  T* gathered;    // scratch for kMaxRows rows
  const T* next;  // what this thread will probably read next; null: unknown
  double* gram;   // [r, r]
  RowFunction before;

  const T* w[kGroupRows] = {};
  const T* later[kGroupRows] = {};

  // Calls body(rows, first row) for a group in steps of kRegisterRows, the rest one by one.
  template <class Body>
  SPECTRAL_INLINE void for_rows(int count, Body body) {
    int row = 0;
    for (; row + kRegisterRows <= count; row += kRegisterRows) body(Rows<kRegisterRows>{}, row);
    for (; row < count; ++row) body(Rows<1>{}, row);
  }

  void group(int64_t row, int count) {
    const T* base = reinterpret_cast<const T*>(m.weight);
    for (int i = 0; i < count; ++i) {
      before(row + i);
      w[i] =
          m.outer == 1 ? base + (row + i) * m.row_stride : gather_row(m, row + i, gathered + i * n);
      const int64_t beyond = row + count + i - tile.row_end;
      if (beyond < 0 && m.outer == 1)
        later[i] = w[i] + count * m.row_stride;
      else
        later[i] = beyond >= 0 && next != nullptr ? next + beyond * n : w[i];
    }
    S product[kGroupRows][kMaxVectors] = {};
    for (int64_t c = 0; c < n; c += kColumns) {
      const int64_t width = n - c < kColumns ? n - c : kColumns;
      for (int j = 0; j < r; j += NV)
        for_rows(count, [&](auto rows, int i) __attribute__((always_inline)) {
          S(*out)[kMaxVectors] = reinterpret_cast<S(*)[kMaxVectors]>(&product[i][j]);
          if (kPrefetch && j == 0)
            dot_block<rows.count, NV, true>(w + i, later + i, v + j * n, n, c, width, out);
          else
            dot_block<rows.count, NV, false>(w + i, later + i, v + j * n, n, c, width, out);
        });
    }
    for (int i = 0; i < count; ++i) {
      double wide[kMaxVectors];
      for (int j = 0; j < r; ++j) {
        s[j * m.rows + row + i] = product[i][j];
        wide[j] = product[i][j];
      }
      for (int j = 0; j < r; ++j)
        for (int k = 0; k < r; ++k) gram[j * r + k] = fused(wide[j], wide[k], gram[j * r + k]);
      for (int j = 0; j < r; ++j) product[i][j] = (S)(wide[j] * scale);
    }
    if (t == nullptr) return;
    for (int64_t c = 0; c < n; c += kColumns) {
      const int64_t width = n - c < kColumns ? n - c : kColumns;
      for (int j = 0; j < r; j += NV)
        for_rows(count, [&](auto rows, int i) __attribute__((always_inline)) {
          const S(*a)[kMaxVectors] = reinterpret_cast<const S(*)[kMaxVectors]>(&product[i][j]);
          const bool first = row + i == tile.row_begin;
          if (kPrefetch && j == 0)
            add_block<rows.count, NV, true>(w + i, later + i, a, n, c, width, t + j * n, first);
          else
            add_block<rows.count, NV, false>(w + i, later + i, a, n, c, width, t + j * n, first);
        });
    }
  }

  void run() {
    int64_t most = m.outer == 1 ? kGroupBytes / (n * (int64_t)sizeof(T)) : kMaxRows;
    most = most < kMaxRows ? kMaxRows : most > kGroupRows ? kGroupRows : most;
    most -= most % kMaxRows;
    for (int64_t row = tile.row_begin; row < tile.row_end; row += most)
      group(row, (int)(tile.row_end - row < most ? tile.row_end - row : most));
  }

  template <int kCount>
  struct Rows {
    static constexpr int count = kCount;
  };
};

// Writes S, the partial T and the partial Gram matrix of a tile; v is one of the vectors of the
// header.
template <int NV, class T, bool kPrefetch, class S>
void subspace_products(const Header& header, const Tile& tile, const T* next, const S* v,
                       const Scratch& scratch, RowFunction before) {
  const Matrix& m = reinterpret_cast<const Matrix*>(header.matrices)[tile.matrix];
  const int64_t n = m.outer * m.inner, r = header.r;
  const double sigma = reinterpret_cast<const S*>(header.sigmas)[tile.matrix];
  S* s = reinterpret_cast<S*>(header.s) + m.s_offset;
  S* t = header.t_partial == 0 ? nullptr : reinterpret_cast<S*>(header.t_partial) + tile.t_offset;
  const int64_t index = &tile - reinterpret_cast<const Tile*>(header.tiles);
  double* gram = reinterpret_cast<double*>(header.gram_partial) + index * r * r;
  for (int64_t i = 0; i < r * r; ++i) gram[i] = 0;
  v += m.v_offset;
  if constexpr (Simd<T>::kSplits) {
    for (int64_t j = 0; j < r; ++j) split_order<T>(v + j * n, scratch.v + j * n, n);
    v = scratch.v;
  }
  SubspaceTask<NV, T, kPrefetch, S> task{m,
                                         tile,
                                         n,
                                         (int)r,
                                         inverse_power_of_two(sigma),
                                         v,
                                         s,
                                         t,
                                         reinterpret_cast<T*>(scratch.rows),
                                         next,
                                         gram,
                                         before};
  task.run();
  if (Simd<T>::kSplits && t != nullptr)
    for (int64_t j = 0; j < r; ++j) memory_order<T>(t + j * n, n);
}

}  // namespace
}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
