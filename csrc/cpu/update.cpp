// An optimizer's step that contains the penalty, in one pass over weights, gradients and moments.
//
// A row is updated with its gradient and the penalty's, strength * dR/dW at the s and v of the
// previous pass; while it is in the cache it is multiplied by v_next to s and into t, for the next
// step. AdamW and SGD are rules of the same pass.

#include "elementwise.h"
#include "isa.h"
#include "scalar_math.h"
#include "tile_products.h"
#include "update_factors.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

constexpr int64_t kAheadInRow = 512;  // bytes between the update and the prefetch

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

template <class V>
SPECTRAL_INLINE V sqrt_lanes(V x) {
  for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}
#if defined(__AVX512F__)
SPECTRAL_INLINE f32v sqrt_lanes(f32v x) { return (f32v)_mm512_maskz_sqrt_ps(0xffff, (__m512)x); }
SPECTRAL_INLINE f64v sqrt_lanes(f64v x) { return (f64v)_mm512_maskz_sqrt_pd(0xff, (__m512d)x); }
#elif defined(__AVX2__)
SPECTRAL_INLINE f32v sqrt_lanes(f32v x) { return (f32v)_mm256_sqrt_ps((__m256)x); }
SPECTRAL_INLINE f64v sqrt_lanes(f64v x) { return (f64v)_mm256_sqrt_pd((__m256d)x); }
#elif defined(__SSE2__)
SPECTRAL_INLINE f32v sqrt_lanes(f32v x) { return (f32v)_mm_sqrt_ps((__m128)x); }
SPECTRAL_INLINE f64v sqrt_lanes(f64v x) { return (f64v)_mm_sqrt_pd((__m128d)x); }
#endif

// Arithmetic of the optimizers' rules on the lanes of a SIMD vector.
struct Lanes {
  template <class V>
  static SPECTRAL_INLINE V root_of(V x) {
    return sqrt_lanes(x);
  }
  template <class V>
  static SPECTRAL_INLINE V quotient_of(V x, V y) {
    return x / y;
  }
};

// For weights that are not multiplied, or later.
template <class T>
struct NoProducts {
  SPECTRAL_INLINE void pair(const T*, int64_t) {}
  SPECTRAL_INLINE void one(const T*, int64_t) {}
  SPECTRAL_INLINE void part(const T*, int64_t, int64_t) {}
};

// The update of a stretch of elements: g / grad_scale + in_gradient * x goes through the rule,
// beside_it * x straight to the weights, where x is the element-dependent factor of the penalty's
// gradient.
template <class Rule, class T, class M, class S>
struct Stretch {
  using V = typename Simd<T>::V;
  static constexpr int kLanes = Simd<T>::kLanes;
  // Split order is used if all arrays are split alike.
  static constexpr bool kPairs = is_same<T, M> || !Simd<T>::kSplits;
  static constexpr bool kSplits = kPairs && Simd<T>::kSplits;

  T* p;
  const T* g;  // null: zeros
  M* first;    // null: not stored
  M* second;
  S inverse_scale, in_gradient, beside_it;

  // The stretch that begins with element i of this one.
  SPECTRAL_INLINE Stretch from(int64_t i) const {
    Stretch piece = *this;
    piece.p += i;
    if (g != nullptr) piece.g += i;
    if (first != nullptr) piece.first += i;
    if (second != nullptr) piece.second += i;
    return piece;
  }

  // Updates weight and moments.
  SPECTRAL_INLINE void apply(const Rule& rule, V& weight, V gradient, V x, V& m1, V& m2) const {
    gradient = gradient * inverse_scale + x * in_gradient;
    rule(weight, gradient, m1, m2);
    weight += x * beside_it;
  }

  template <class E>
  static SPECTRAL_INLINE void prefetch(const E* p) {
    for (int i = 0; i < 2 * kLanes * (int)sizeof(E); i += kLine)
      __builtin_prefetch((const char*)p + kAheadInRow + i, 0, 3);
  }

  template <class Products>
  SPECTRAL_INLINE void pair(const Rule& rule, int64_t c, V x0, V x1, Products& products) const {
    V p0, p1, g0{}, g1{}, a0{}, a1{}, b0{}, b1{};
    prefetch(p + c);
    prefetch(g + c);
    prefetch(first + c);
    if (Rule::kMoments > 1) prefetch(second + c);
    Simd<T>::load_pair(p + c, p0, p1);
    if (g != nullptr) Simd<T>::load_pair(g + c, g0, g1);
    if (first != nullptr) Simd<M>::load_pair(first + c, a0, a1);
    if (Rule::kMoments > 1) Simd<M>::load_pair(second + c, b0, b1);
    apply(rule, p0, g0, x0, a0, b0);
    apply(rule, p1, g1, x1, a1, b1);
    Simd<T>::store_pair(p + c, p0, p1);
    products.pair(p, c);
    if (first != nullptr) Simd<M>::store_pair(first + c, a0, a1);
    if (Rule::kMoments > 1) Simd<M>::store_pair(second + c, b0, b1);
  }

  // A pair whose moments have changed and whose weights have not.
  struct Begun {
    V m0, m1, root0, root1;
  };

  template <class X>
  SPECTRAL_INLINE Begun begin_pair(const Rule& rule, int64_t c, const X& x) const {
    V x0, x1, g0{}, g1{}, a0, a1, b0, b1;
    prefetch(p + c);
    prefetch(g + c);
    prefetch(first + c);
    prefetch(second + c);
    x.pair(c, x0, x1);
    if (g != nullptr) Simd<T>::load_pair(g + c, g0, g1);
    Simd<M>::load_pair(first + c, a0, a1);
    Simd<M>::load_pair(second + c, b0, b1);
    const V root0 = rule.begin(g0 * inverse_scale + x0 * in_gradient, a0, b0);
    const V root1 = rule.begin(g1 * inverse_scale + x1 * in_gradient, a1, b1);
    Simd<M>::store_pair(first + c, a0, a1);
    Simd<M>::store_pair(second + c, b0, b1);
    return {a0, a1, root0, root1};
  }

  template <class X, class Products>
  SPECTRAL_INLINE void end_pair(const Rule& rule, int64_t c, const X& x, V change0, V change1,
                                Products& products) const {
    V x0, x1, p0, p1;
    x.pair(c, x0, x1);
    Simd<T>::load_pair(p + c, p0, p1);
    rule.end(p0, change0);
    rule.end(p1, change1);
    p0 += x0 * beside_it;
    p1 += x1 * beside_it;
    Simd<T>::store_pair(p + c, p0, p1);
    products.pair(p, c);
  }

  // All pairs by a rule that comes in parts: between a pair's roots, its quotients and its weights
  // there is work on the pair after it, so that the processor does not fill up with operations
  // that wait. Returns where it stopped.
  template <class X, class Products>
  SPECTRAL_INLINE int64_t run_in_parts(const Rule& rule, int64_t n, const X& x,
                                       Products& products) const {
    constexpr int kPair = 2 * kLanes;
    if (n < kPair) return 0;
    Begun begun = begin_pair(rule, 0, x);
    int64_t c = kPair;
    for (; c + kPair <= n; c += kPair) {
      const V change0 = rule.change_of(begun.m0, begun.root0);
      const V change1 = rule.change_of(begun.m1, begun.root1);
      begun = begin_pair(rule, c, x);
      end_pair(rule, c - kPair, x, change0, change1, products);
    }
    end_pair(rule, c - kPair, x, rule.change_of(begun.m0, begun.root0),
             rule.change_of(begun.m1, begun.root1), products);
    return c;
  }

  template <class Products>
  SPECTRAL_INLINE void one(const Rule& rule, int64_t c, V x, Products& products) const {
    V weight = Simd<T>::load(p + c), gradient{}, m1{}, m2{};
    if (g != nullptr) gradient = Simd<T>::load(g + c);
    if (first != nullptr) m1 = Simd<M>::load(first + c);
    if (Rule::kMoments > 1) m2 = Simd<M>::load(second + c);
    apply(rule, weight, gradient, x, m1, m2);
    Simd<T>::store(p + c, weight);
    products.one(p, c);
    if (first != nullptr) Simd<M>::store(first + c, m1);
    if (Rule::kMoments > 1) Simd<M>::store(second + c, m2);
  }

  SPECTRAL_INLINE void part(const Rule& rule, int64_t c, int64_t n, V x) const {
    V weight = load_part(p + c, n), gradient{}, m1{}, m2{};
    if (g != nullptr) gradient = load_part(g + c, n);
    if (first != nullptr) m1 = load_part(first + c, n);
    if (Rule::kMoments > 1) m2 = load_part(second + c, n);
    apply(rule, weight, gradient, x, m1, m2);
    store_part(p + c, weight, n);
    if (first != nullptr) store_part(first + c, m1, n);
    if (Rule::kMoments > 1) store_part(second + c, m2, n);
  }

  // x by its methods pair, one and part; the new weights go to those of products.
  template <class X, class Products>
  SPECTRAL_INLINE void run(const Rule& rule, int64_t n, const X& x, Products& products) const {
    int64_t c = 0;
    if constexpr (kPairs && Rule::kInParts && X::kIsRead) {
      c = run_in_parts(rule, n, x, products);
    } else if (kPairs) {
      for (; c + 2 * kLanes <= n; c += 2 * kLanes) {
        V x0, x1;
        x.pair(c, x0, x1);
        pair(rule, c, x0, x1, products);
      }
    }
    for (; c + kLanes <= n; c += kLanes) one(rule, c, x.one(c), products);
    if (c == n) return;
    part(rule, c, n - c, x.part(c, n - c));
    products.part(p, c, n);
  }

  template <class X>
  SPECTRAL_INLINE void run(const Rule& rule, int64_t n, const X& x) const {
    NoProducts<T> none;
    run(rule, n, x, none);
  }
};

template <class S>
double steps_of(const Update& update, const Moment& moment) {
  return reinterpret_cast<const float*>(update.steps)[moment.parameter];
}

template <class Rule, class T, class M, class S>
Stretch<Rule, T, M, S> stretch_of(const Update& update, int64_t weight, int64_t grad,
                                  const Moment& moment) {
  return {reinterpret_cast<T*>(weight),
          reinterpret_cast<const T*>(grad),
          reinterpret_cast<M*>(moment.first),
          reinterpret_cast<M*>(moment.second),
          (S)(update.grad_scale == 0 ? 1 : 1 / *reinterpret_cast<const float*>(update.grad_scale)),
          1,
          0};
}

// The penalty's gradient is a * x: through the rule, or decoupled from it; or a constraint takes
// a * x from the weights.
template <class Any, class S>
SPECTRAL_INLINE void put_penalty(Any& stretch, const Update& update, double lr, S a) {
  stretch.in_gradient = update.decoupled ? 0 : a;
  stretch.beside_it = update.decoupled ? (S)(-lr) * a : 0;
}

// What put_penalty wants: a constraint does not depend on the learning rate.
SPECTRAL_INLINE double pull_lr(const Update& update, const Group& group) {
  return update.constraint != kFree ? 1 : group.lr;
}

// What s is multiplied by, and in `part` what the step takes of the weights.
template <class S>
double matrix_factor(const Header& header, const Update& update, int64_t index, double lr,
                     double& part) {
  const Matrix& m = reinterpret_cast<const Matrix*>(header.matrices)[index];
  part = 0;
  if (update.constraint != kFree) {
    const double held = held_factor<S>(header, index, update.constraint);
    if (update.constraint == kCap) return held / (double)m.reach;
    part = held;
    return 0;
  }
  const double factor = gradient_factor<S>(header, index);
  if (!update.decoupled) return factor;
  return capped_factor_of(factor, reinterpret_cast<const S*>(header.sigmas)[index],
                          reinterpret_cast<const S*>(header.target)[index], lr, m.reach);
}

template <class Rule>
SPECTRAL_INLINE Rule rule_of(const Group& group, double step, double part) {
  Rule rule(group, step);
  if constexpr (Rule::kScales)
    if (part != 0) rule.shrink(part);
  return rule;
}

template <template <class, class> class RuleOf, class T, class M>
void update_tile(const Header& header, const Update& update, const Tile& tile, const Tile* next,
                 const Scratch& scratch) {
  using S = typename Simd<T>::Accumulator;
  const Matrix& m = reinterpret_cast<const Matrix*>(header.matrices)[tile.matrix];
  const Moment& moment = reinterpret_cast<const Moment*>(update.matrix_moments)[tile.matrix];
  const S* v_next = reinterpret_cast<const S*>(header.v_next);
  const Group& group = reinterpret_cast<const Group*>(update.groups)[moment.group];
  using Rule = RuleOf<S, Lanes>;
  const bool caps = header.operators == 0 && header.r > 1 && update.constraint == kCap;
  const int64_t terms = header.operators != 0 ? 2 : caps ? header.r : 1;
  const double lr = pull_lr(update, group);
  double part;
  const double factor = matrix_factor<S>(header, update, tile.matrix, lr, part);
  const Rule rule = rule_of<Rule>(group, steps_of<S>(update, moment), part);
  const S* v = reinterpret_cast<const S*>(header.v) + m.v_offset;
  const S* s = reinterpret_cast<const S*>(header.s) + m.s_offset;
  using Piece = Stretch<Rule, T, M, S>;
  if constexpr (Piece::kSplits) {
    for (int64_t o = 0; o < terms * m.outer; ++o)
      split_order<T>(v + o * m.inner, scratch.gradient_v + o * m.inner, m.inner);
    v = scratch.gradient_v;
  }
  const Piece whole = stretch_of<Rule, T, M, S>(update, m.weight, m.grad, moment);
  // s of a row, or its imaginary part, times the factor.
  const auto scaled = [&](int64_t i) __attribute__((always_inline)) {
    return factor == 0 ? 0 : plain_nan((S)(factor * s[i]));
  };
  // Piece o of a row.
  const auto piece_of = [&](int64_t row, int64_t o) __attribute__((always_inline)) {
    Piece piece = whole;
    const int64_t at = row * m.row_stride + o * m.outer_stride;
    piece.p += at;
    if (piece.g != nullptr) piece.g += row * m.grad_row_stride + o * m.grad_outer_stride;
    if (piece.first != nullptr) piece.first += at;
    if (piece.second != nullptr) piece.second += at;
    return piece;
  };
  if (caps) {
    double factors[kMaxVectors];
    int64_t n = 0;  // those above the target come first
    while (n < terms && (factors[n] = held_factor<S>(header, tile.matrix, kCap, n)) > 0) ++n;
    const auto update_row = [&](int64_t row) {
      NoProducts<T> none;
      S a[kMaxVectors];
      for (int64_t j = 0; j < n; ++j) a[j] = plain_nan((S)(factors[j] * s[j * m.rows + row]));
      for (int64_t o = 0; o < m.outer; ++o) {
        Piece piece = piece_of(row, o);
        put_penalty(piece, update, lr, (S)(n > 0));
        if (n > 0)
          piece.run(rule, m.inner, SumFactor<S>{v + o * m.inner, m.outer * m.inner, a, n}, none);
        else
          piece.run(rule, m.inner, NoFactor<typename Simd<T>::V>{}, none);
      }
    };
    tile_products<T, false>(header, tile, next, v_next, scratch, RowFunction(update_row));
    return;
  }
  if (terms > 1) {
    const auto update_row = [&](int64_t row) {
      NoProducts<T> none;
      const S a0 = scaled(row), a1 = scaled(m.rows + row);
      for (int64_t o = 0; o < m.outer; ++o) {
        Piece piece = piece_of(row, o);
        put_penalty(piece, update, lr, (S)1);
        const TwoTermFactor<S> x{v + o * m.inner, m.outer * m.inner, a0, a1};
        piece.run(rule, m.inner, x, none);
      }
    };
    tile_products<T, false>(header, tile, next, v_next, scratch, RowFunction(update_row));
    return;
  }
  // Updates piece o of a row, and hands the new weights over.
  const auto update_piece = [&](int64_t row, int64_t o, auto& to) __attribute__((always_inline)) {
    Piece piece = piece_of(row, o);
    put_penalty(piece, update, lr, scaled(row));
    piece.run(rule, m.inner, RowFactor<S>{v + o * m.inner}, to);
  };
  // With little to compute, t would cost more, written for every row, than a second look at 16-bit
  // weights, four rows at a time.
  constexpr bool kAlong = Piece::kPairs && (Rule::kInParts || is_same<T, S>);
  if constexpr (kAlong) {
    if (header.r == 1 && m.outer == 1 && header.t_partial != 0) {
      const auto update_row = [&](int64_t row, auto& to)
                                  __attribute__((always_inline)) { update_piece(row, 0, to); };
      return products_along<T>(header, tile, scratch, update_row);
    }
  }
  const auto update_row = [&](int64_t row) {
    NoProducts<T> none;
    for (int64_t o = 0; o < m.outer; ++o) update_piece(row, o, none);
  };
  // No prefetching of weights as in gram_matvec: it made the step up to 10 % slower.
  tile_products<T, false>(header, tile, next, v_next, scratch, RowFunction(update_row));
}

template <template <class, class> class RuleOf, class T, class M>
void update_elements(const Header& header, const Update& update, const Elementwise& entry,
                     const Moment& moment, int64_t index) {
  using S = typename Simd<T>::Accumulator;
  if (moment.group < 0) return;
  const Group& group = reinterpret_cast<const Group*>(update.groups)[moment.group];
  const RuleOf<S, Lanes> rule(group, steps_of<S>(update, moment));
  auto stretch = stretch_of<RuleOf<S, Lanes>, T, M, S>(update, entry.weight, entry.grad, moment);
  if (index < 0) {
    stretch.run(rule, entry.size, NoFactor<typename Simd<T>::V>{});
    return;
  }
  put_penalty(stretch, update, pull_lr(update, group), (S)1);
  if (entry.kind == kRows) {
    const double lr = update.decoupled ? group.lr : 0;
    for (int64_t row = 0; row < rows_of(entry); ++row) {
      const auto piece = stretch.from(row * entry.length);
      piece.run(rule, entry.length,
                OneRowFactor<T>{piece.p,
                                RowGradient<T>(header, entry, index, row, lr, update.constraint)});
    }
    return;
  }
  const ElementwiseGradient<S> gradient = elementwise_gradient_of<S>(header, entry, index);
  if (update.constraint != kFree) {
    const HeldElements<S> held(strength_of<S>(header, header.n_matrices + index), gradient.norm,
                               entry, update.constraint, gradient.above);
    stretch.run(rule, entry.size, ElementwiseFactor<T, S, HeldElements<S>>{stretch.p, held});
  } else if (update.decoupled) {
    const CappedGradient<S> capped(gradient, group.lr);
    stretch.run(rule, entry.size, ElementwiseFactor<T, S, CappedGradient<S>>{stretch.p, capped});
  } else {
    stretch.run(rule, entry.size,
                ElementwiseFactor<T, S, ElementwiseGradient<S>>{stretch.p, gradient});
  }
}

// Calls function(T{}, M{}) with the types of weights and moments.
template <class Function>
SPECTRAL_INLINE void with_dtypes(const Header& header, const Update& update, Function function) {
  with_dtype(header.weight_dtype, [&](auto t) {
    using T = decltype(t);
    if (update.moment_dtype == header.weight_dtype)
      function(T{}, T{});
    else if constexpr (sizeof(T) == 2)
      function(T{}, float{});
  });
}

}  // namespace

void update_tile(const Header& header, const Update& update, const Tile& tile, const Tile* next,
                 const Scratch& scratch) noexcept {
  if (reinterpret_cast<const Moment*>(update.matrix_moments)[tile.matrix].group < 0) {
    Header from_next = header;
    from_next.v = header.v_next;
    from_next.tolerance = 0;
    return gram_matvec(from_next, tile, next, scratch);
  }
  with_dtypes(header, update, [&](auto t, auto m) {
    if (update.rule == kAdamW)
      update_tile<AdamW, decltype(t), decltype(m)>(header, update, tile, next, scratch);
    else if (update.constraint == kSphere)
      update_tile<SgdOnSphere, decltype(t), decltype(m)>(header, update, tile, next, scratch);
    else
      update_tile<Sgd, decltype(t), decltype(m)>(header, update, tile, next, scratch);
  });
}

void update_elementwise(const Header& header, const Update& update, int64_t index) noexcept {
  const bool other = index >= header.n_elementwise;
  const int64_t i = other ? index - header.n_elementwise : index;
  const Elementwise& entry =
      reinterpret_cast<const Elementwise*>(other ? update.others : header.elementwise)[i];
  const Moment& moment =
      reinterpret_cast<const Moment*>(other ? update.other_moments : update.elementwise_moments)[i];
  with_dtypes(header, update, [&](auto t, auto m) {
    if (update.rule == kAdamW)
      update_elements<AdamW, decltype(t), decltype(m)>(header, update, entry, moment,
                                                       other ? -1 : i);
    else
      update_elements<Sgd, decltype(t), decltype(m)>(header, update, entry, moment, other ? -1 : i);
    if (!other) elementwise_norm_of<decltype(t)>(header, i);
  });
}

}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
