// The penalty's gradient: strength * 2 k (sigma^k - tau^k) sigma^(k-1) u v^T with u = s / sigma
// for a matrix, and its counterparts for elementwise parameters.

#include "elementwise.h"
#include "isa.h"
#include "scalar_math.h"
#include "tiles.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

constexpr int64_t kAheadInGradient = 1024;  // bytes between the addition and the prefetch

// The sum of the terms a[j] * v[j] of a row; v in split order if the type needs it.
template <int kTerms, class S>
struct Row {
  const S* v;
  int64_t distance;  // between the vectors
  S a[kTerms];

  // Of the full vector of elements from c on; of the first n elements from there.
  SPECTRAL_INLINE auto at(int64_t c) const {
    auto sum = Simd<S>::load(v + c) * a[0];
    if constexpr (kTerms > 1) sum += Simd<S>::load(v + distance + c) * a[1];
    return sum;
  }
  SPECTRAL_INLINE auto part(int64_t c, int64_t n) const {
    auto sum = load_part(v + c, n) * a[0];
    if constexpr (kTerms > 1) sum += load_part(v + distance + c, n) * a[1];
    return sum;
  }
  template <class G>
  SPECTRAL_INLINE auto tail(const Tail<G>& of) const {
    auto sum = of.load(v) * a[0];
    if constexpr (kTerms > 1) sum += of.load(v + distance) * a[1];
    return sum;
  }
};

// grad[c] = (accumulate ? grad[c] : 0) + row[c]
template <bool kAccumulate, class G, class R>
SPECTRAL_INLINE void add_row(G* grad, const R& row, int64_t n) {
  using L = Simd<G>;
  using V = typename L::V;
  int64_t c = for_pairs<G>(n, [&](int64_t c, bool prefetch) __attribute__((always_inline)) {
    if (kAccumulate && prefetch) prefetch_pair(grad + c + kAheadInGradient / (int64_t)sizeof(G));
    V x0 = row.at(c), x1 = row.at(c + L::kLanes);
    if (kAccumulate) {
      V g0, g1;
      L::load_pair(grad + c, g0, g1);
      x0 += g0;
      x1 += g1;
    }
    L::store_pair(grad + c, x0, x1);
  });
  if (c + L::kLanes <= n) {
    V x = row.at(c);
    if (kAccumulate) x += L::load(grad + c);
    L::store(grad + c, x);
    c += L::kLanes;
  }
  if (c < n) {
    const Tail<G> tail(n, c);
    if (kAccumulate && !PartOf<G>::kInOne) {
      tail.store(grad, tail.load_all(grad) + row.tail(tail));
    } else {
      V x = row.part(c, n - c);
      if (kAccumulate) x += load_part(grad + c, n - c);
      store_part(grad + c, x, n - c);
    }
  }
}

template <bool kAccumulate, int kTerms, class G, class S = typename Simd<G>::Accumulator>
void rank_one_tile(const Header& header, const Tile& tile, const Scratch& scratch) {
  const Matrix& m = reinterpret_cast<const Matrix*>(header.matrices)[tile.matrix];
  const double factor = gradient_factor<S>(header, tile.matrix);
  const S* v = reinterpret_cast<const S*>(header.v) + m.v_offset;
  const S* s = reinterpret_cast<const S*>(header.s) + m.s_offset;
  if constexpr (Simd<G>::kSplits) {
    for (int64_t o = 0; o < kTerms * m.outer; ++o)
      split_order<G>(v + o * m.inner, scratch.gradient_v + o * m.inner, m.inner);
    v = scratch.gradient_v;
  }
  for (int64_t i = tile.row_begin; i < tile.row_end; ++i) {
    G* grad = reinterpret_cast<G*>(m.grad) + i * m.grad_row_stride;
    Row<kTerms, S> row{v, m.outer * m.inner, {}};
    for (int j = 0; j < kTerms; ++j)
      row.a[j] = factor == 0 ? 0 : plain_nan((S)(factor * s[j * m.rows + i]));
    for (int64_t o = 0; o < m.outer; ++o, row.v += m.inner)
      add_row<kAccumulate>(grad + o * m.grad_outer_stride, row, m.inner);
  }
}

// grad[c] = (accumulate ? grad[c] : 0) + gradient of x[c]
template <bool kAccumulate, class G, class T>
SPECTRAL_INLINE void add_row_gradient(G* grad, const T* x, int64_t n,
                                      const RowGradient<T>& gradient) {
  constexpr int kLanes = Simd<T>::kLanes;
  if (n < kLanes) {
    auto value = gradient.of(load_part(x, n));
    if (kAccumulate) value += load_part(grad, n);
    return store_part(grad, value, n);
  }
  // The last vector overlaps the one before it: it is computed first, from what is there now, and a
  // load does not wait for a store.
  auto last = gradient.of(Simd<T>::load(x + n - kLanes));
  if (kAccumulate) last += Simd<G>::load(grad + n - kLanes);
  for (int64_t c = 0; c + kLanes <= n; c += kLanes) {
    auto value = gradient.of(Simd<T>::load(x + c));
    if (kAccumulate) value += Simd<G>::load(grad + c);
    Simd<G>::store(grad + c, value);
  }
  Simd<G>::store(grad + n - kLanes, last);
}

// Norms of a few rows at a time: the root and the quotients of one do not wait for another's.
template <bool kAccumulate, class T, class G>
void add_rows_gradient(const Header& header, const Elementwise& entry, int64_t index) {
  constexpr int kTogether = 4;
  const T* x = reinterpret_cast<const T*>(entry.weight);
  G* grad = reinterpret_cast<G*>(entry.grad);
  const int64_t n = entry.length, n_rows = rows_of(entry);
  const auto of = [&](int64_t row) __attribute__((always_inline)) {
    return RowGradient<T>(header, entry, index, row, 0, kFree);
  };
  int64_t row = 0;
  for (; row + kTogether <= n_rows; row += kTogether) {
    const RowGradient<T> gradients[kTogether] = {of(row), of(row + 1), of(row + 2), of(row + 3)};
    for (int i = 0; i < kTogether; ++i)
      add_row_gradient<kAccumulate>(grad + (row + i) * n, x + (row + i) * n, n, gradients[i]);
  }
  for (; row < n_rows; ++row)
    add_row_gradient<kAccumulate>(grad + row * n, x + row * n, n, of(row));
}

template <bool kAccumulate, class T, class G, class S = typename Simd<T>::Accumulator>
void add_elementwise_gradient(const Header& header, const Elementwise& entry, int64_t index) {
  const T* x = reinterpret_cast<const T*>(entry.weight);
  G* grad = reinterpret_cast<G*>(entry.grad);
  constexpr int kLanes = Simd<T>::kLanes;
  if (entry.kind == kRows) return add_rows_gradient<kAccumulate, T, G>(header, entry, index);
  const ElementwiseGradient<S> gradient = elementwise_gradient_of<S>(header, entry, index);
  for (int64_t i = 0; i < entry.size; i += kLanes) {
    const int64_t width = entry.size - i < kLanes ? entry.size - i : kLanes;
    auto value = width == kLanes ? Simd<T>::load(x + i) : load_part(x + i, width);
    for (int64_t j = 0; j < width; ++j) value[j] = plain_nan((S)gradient.of(value[j], i + j));
    if (kAccumulate)
      value += width == kLanes ? Simd<G>::load(grad + i) : load_part(grad + i, width);
    if (width == kLanes)
      Simd<G>::store(grad + i, value);
    else
      store_part(grad + i, value, width);
  }
}

// float64 gradients occur with float64 weights only; all other types may be mixed.
template <class T, class Function>
SPECTRAL_INLINE void with_grad_dtype(int64_t dtype, Function function) {
  if constexpr (sizeof(T) == 8) {
    function(double{});
  } else {
    with_dtype(dtype, [&](auto g) {
      if constexpr (sizeof(g) != 8) function(g);
    });
  }
}

}  // namespace

void rank_one(const Header& header, const Tile& tile, bool accumulate,
              const Scratch& scratch) noexcept {
  const Matrix& m = reinterpret_cast<const Matrix*>(header.matrices)[tile.matrix];
  if (m.grad == 0) return;
  with_dtype(m.grad_dtype, [&](auto g) {
    using G = decltype(g);
    if (header.operators != 0)
      accumulate ? rank_one_tile<true, 2, G>(header, tile, scratch)
                 : rank_one_tile<false, 2, G>(header, tile, scratch);
    else
      accumulate ? rank_one_tile<true, 1, G>(header, tile, scratch)
                 : rank_one_tile<false, 1, G>(header, tile, scratch);
  });
}

void elementwise_gradient(const Header& header, int64_t index, bool accumulate) noexcept {
  const Elementwise& entry = reinterpret_cast<const Elementwise*>(header.elementwise)[index];
  if (entry.grad == 0) return;
  with_dtype(header.weight_dtype, [&](auto t) {
    using T = decltype(t);
    with_grad_dtype<T>(entry.grad_dtype, [&](auto g) {
      using G = decltype(g);
      if (accumulate)
        add_elementwise_gradient<true, T, G>(header, entry, index);
      else
        add_elementwise_gradient<false, T, G>(header, entry, index);
    });
  });
}

}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
