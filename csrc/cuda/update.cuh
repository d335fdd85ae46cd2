// An optimizer's step that contains the penalty, in one pass over weights, gradients and moments.
//
// Rows go through registers as in products.cuh. On their way there they are updated with their
// gradient and the penalty's, strength * dR/dW at the s and v of the previous launch; the
// new weights are multiplied by v_next, and by that into t, for the next step. AdamW and SGD are
// rules of the same pass, in a file each: a rule changes p and the moments m1, m2 of an element by
// gradient g as in torch.optim.
#pragma once

#include "backend.h"
#include "elementwise.cuh"
#include "products.cuh"

namespace spectral {
namespace cuda {

// The rules that update() chooses from.
void adamw(const Header& header, const Update& update, int device, int64_t stream);
void sgd(const Header& header, const Update& update, int device, int64_t stream);

namespace {

// Weights, gradients and moments, all with the same layout.
template <class T, class M>
struct Arrays {
  T* p;
  const T* g;  // null: zeros
  M* m1;       // null: not stored
  M* m2;       // null: the rule has none
};

template <class T, class M>
__device__ __forceinline__ Arrays<T, M> arrays_at(int64_t weight, int64_t grad,
                                                  const Moment& moment, int64_t first) {
  Arrays<T, M> x{at<T>(weight), at<const T>(grad), at<M>(moment.first), at<M>(moment.second)};
  x.p += first;
  if (x.g != nullptr) x.g += first;
  if (x.m1 != nullptr) x.m1 += first;
  if (x.m2 != nullptr) x.m2 += first;
  return x;
}

// The update of the elements of a parameter: g / grad_scale + in_gradient * penalty's gradient
// goes through the rule, beside_it * penalty's gradient straight to the weights.
template <class Rule, class T, class M>
struct Change {
  Arrays<T, M> arrays;
  bool acts;  // false: nothing changes, and the fields below are not set
  Rule rule;
  float inverse_scale, in_gradient, beside_it;
};

// The learning rate for which the penalty's gradient is capped; 0: it is not.
__device__ __forceinline__ double capping_lr(const Update& update, const Moment& moment) {
  if (!update.decoupled || moment.group < 0) return 0;
  return at<const Group>(update.groups)[moment.group].lr;
}

__device__ __forceinline__ bool is_skipped(const Update& update) {
  return update.found_inf != 0 && *at<const float>(update.found_inf) > 0;
}

// Every thread of the block must call it, once; it is a barrier. One thread computes, since float64
// is slow on many devices, and the result stays in shared memory, to save registers. part(): what
// the step takes of the weights too.
template <class Rule, class T, class M, class Part>
__device__ __forceinline__ const Change<Rule, T, M>& change_of(const Update& update,
                                                               const Moment& moment,
                                                               const Arrays<T, M>& arrays,
                                                               Part part) {
  __shared__ Change<Rule, T, M> change;
  if (threadIdx.x == 0) {
    change.arrays = arrays;
    change.acts = moment.group >= 0 && !is_skipped(update);
    if (change.acts) {
      const Group& group = at<const Group>(update.groups)[moment.group];
      change.rule = Rule(group, at<const float>(update.steps)[moment.parameter]);
      if constexpr (Rule::kScales) {
        const double taken = part();
        if (taken != 0) change.rule.shrink(taken);
      }
      change.inverse_scale = update.grad_scale == 0 ? 1 : 1 / *at<const float>(update.grad_scale);
      change.in_gradient = update.decoupled ? 0 : 1;
      change.beside_it = update.constraint != kFree ? -1 : update.decoupled ? (float)-group.lr : 0;
    }
  }
  __syncthreads();
  return change;
}

__device__ __forceinline__ double no_part() { return 0; }

// kWidth neighbouring elements as in memory, in as few loads as possible.
template <class E, int kWidth>
struct Elements {
  static constexpr int kPerPart = kWidth == 1 ? 1 : kPerLoad<E>, kParts = kWidth / kPerPart;
  using Bits = std::conditional_t<kWidth == 1, E, uint4>;
  Bits part[kParts];

  __device__ __forceinline__ void load(const E* p) {
#pragma unroll
    for (int i = 0; i < kParts; ++i)
      part[i] = __ldcg(reinterpret_cast<const Bits*>(p + i * kPerPart));
  }

  __device__ __forceinline__ void store(E* p) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i) __stcg(reinterpret_cast<Bits*>(p + i * kPerPart), part[i]);
  }

  __device__ __forceinline__ void get(float (&x)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      float y[kPerPart];
      unpack<E>(part[i], y);
#pragma unroll
      for (int j = 0; j < kPerPart; ++j) x[i * kPerPart + j] = y[j];
    }
  }

  __device__ __forceinline__ void set(const float (&x)[kWidth]) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if constexpr (kWidth == 1) {
        part[i] = from_float<E>(x[i]);
      } else {
        float y[kPerPart];
#pragma unroll
        for (int j = 0; j < kPerPart; ++j) y[j] = x[i * kPerPart + j];
        part[i] = pack<E>(y);
      }
    }
  }
};

__device__ __forceinline__ bool are_aligned(int64_t weight, int64_t grad, const Moment& moment) {
  return (weight | grad | moment.first | moment.second) % kLoadBytes == 0;
}

// kWidth elements of each array in registers.
template <class Rule, class T, class M, int kWidth>
struct Piece {
  Elements<T, kWidth> p{}, g{};
  Elements<M, kWidth> m1{}, m2{};

  __device__ __forceinline__ void load(const Change<Rule, T, M>& change, int64_t i) {
    const Arrays<T, M>& from = change.arrays;
    p.load(from.p + i);
    if (!change.acts) return;
    if (from.g != nullptr) g.load(from.g + i);
    if (from.m1 != nullptr) m1.load(from.m1 + i);
    if (Rule::kMoments > 1) m2.load(from.m2 + i);
  }

  // The penalty's gradient is a * x(j, p) of element j, p.
  template <class X>
  __device__ __forceinline__ void step(const Change<Rule, T, M>& change, int64_t i, float a, X x) {
    const Arrays<T, M>& to = change.arrays;
    float weight[kWidth], gradient[kWidth], first[kWidth], second[kWidth];
    p.get(weight), g.get(gradient), m1.get(first), m2.get(second);
    const float in_gradient = change.in_gradient * a, beside_it = change.beside_it * a;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float factor = x(j, weight[j]);
      change.rule(weight[j], gradient[j] * change.inverse_scale + factor * in_gradient, first[j],
                  second[j]);
      weight[j] += factor * beside_it;
    }
    p.set(weight);
    p.store(to.p + i);
    if (to.m1 != nullptr) m1.set(first), m1.store(to.m1 + i);
    if (Rule::kMoments > 1) m2.set(second), m2.store(to.m2 + i);
  }
};

// Rows that are updated when they are loaded.
template <class Rule, class T, class M, bool kAligned>
struct UpdatedRows : Rows<T, kAligned> {
  using Base = Rows<T, kAligned>;
  static constexpr int kWidth = Base::kWidth;
  static constexpr bool kAhead = false;
  // Pieces whose loads are in flight.
  static constexpr int kTogether = !kAligned ? 4 : sizeof(M) > sizeof(T) ? 1 : 2;

  const Change<Rule, T, M>& change;  // whose arrays begin with the tile's first row
  const double& factor;              // of s in the penalty's gradient
  const float *v, *s;

  __device__ __forceinline__ UpdatedRows(const Header& header, const Matrix& m, const Tile& tile,
                                         const Change<Rule, T, M>& change, const double& factor)
      : Base(m, tile),
        change(change),
        factor(factor),
        v(at<const float>(header.v) + m.v_offset),
        s(at<const float>(header.s) + m.s_offset + tile.row_begin) {}

  __device__ __forceinline__ int64_t offset(int row, int64_t c) const {
    const bool plain = kAligned || this->outer == 1;
    return row * this->stride + (plain ? c : column_offset(c, this->inner, this->outer_stride));
  }

  // Calls use(j, r, bits) with columns c + j * step of kRows rows, as they are after the step.
  template <int kPieces, int kRows, class Use>
  __device__ __forceinline__ void load_pieces(int row, int64_t c, int64_t step, Use use) const {
    constexpr int kAll = kPieces * kRows, kBatch = kAll < kTogether ? kAll : kTogether;
    const bool v_aligned = is_aligned(v);
#pragma unroll
    for (int first = 0; first < kAll; first += kBatch) {
      Piece<Rule, T, M, kWidth> piece[kBatch];
      int64_t place[kBatch];
      bool is_inside[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int j = (first + i) / kRows, r = (first + i) % kRows;
        is_inside[i] = row + r < this->count && c + j * step < this->n;
        place[i] = offset(row + r, c + j * step);
        if (is_inside[i]) piece[i].load(change, place[i]);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int j = (first + i) / kRows, r = (first + i) % kRows;
        if (change.acts && is_inside[i]) {
          float x[kWidth];
          load_floats<kWidth>(v + c + j * step, v_aligned, x);
          const float a = factor == 0 ? 0 : (float)(factor * s[row + r]);
          piece[i].step(change, place[i], a, [&](int k, float) { return x[k]; });
        }
        use(j, r, piece[i].p.part[0]);
      }
    }
  }

  template <int kRows, class Use>
  __device__ __forceinline__ void load(int row, int64_t c, Use use) const {
    load_pieces<1, kRows>(row, c, 0, [&](int, int r, auto bits) { use(r, bits); });
  }

  // Ordinary loads: the compiler does not move them before the stores.
  template <int kRows, class Use>
  __device__ __forceinline__ void reload(int row, int64_t c, Use use) const {
    using Bits = typename Base::Bits;
    const T* p = change.arrays.p + offset(row, c);
#pragma unroll
    for (int r = 0; r < kRows; ++r, p += this->stride)
      use(r, row + r < this->count ? *reinterpret_cast<const Bits*>(p) : Bits{});
  }
};

// Fewer rows at a time than gram_matvec takes, since moments want registers too, and the same bits:
// a resumed run may begin with the products of the other kernel.
template <class Rule, class T, class M>
__device__ __forceinline__ double updated_products(const Header& header, const Matrix& m,
                                                   const Tile& tile, const Moment& moment,
                                                   const Change<Rule, T, M>& change,
                                                   const double& factor, const Operands& o,
                                                   int64_t shared_floats) {
  if (!is_aligned<T>(m.weight, m.row_stride, m.outer * m.inner, m.outer) ||
      !are_aligned(m.weight, m.grad, moment)) {
    const UpdatedRows<Rule, T, M, false> w(header, m, tile, change, factor);
    if (w.n <= 4 * 32) return short_rows<4, 2, 4>(w, o);
    return long_rows<4, 2, true>(w, o, shared_floats);
  }
  const UpdatedRows<Rule, T, M, true> w(header, m, tile, change, factor);
  constexpr int kWidth = kPerLoad<T>, kBlock = kThreads * kWidth, kMaxShort = 512;
  constexpr int kPieces = kMaxShort / (32 * kWidth);
  if (w.n <= 32 * kWidth) return short_rows<1, 4, 8>(w, o);
  if (w.n <= kMaxShort) return short_rows<kPieces, 4 / kPieces, 8 / kPieces>(w, o);
  if (w.n <= kBlock) return long_rows<1, 4, false>(w, o, shared_floats);
  return long_rows<4, 1, true>(w, o, shared_floats);
}

// What a cap of several singular values multiplies s_j v_j^T by.
struct Factors {
  double of[kMaxVectors];
  int n;  // those above the target, which come first
};

__device__ __forceinline__ void find_factors(const Header& header, int64_t matrix, Factors& found) {
  int n = 0;
  while (n < header.r && (found.of[n] = held_factor(header, matrix, kCap, n)) != 0) ++n;
  found.n = n;
}

// Updates the rows of a tile, kWidth neighbouring elements per thread, without products.
template <bool kAligned, class Rule, class T, class M>
__device__ __forceinline__ void capped_rows(const Header& header, const Matrix& m, const Tile& tile,
                                            const Change<Rule, T, M>& change,
                                            const Factors& factors) {
  constexpr int kWidth = kAligned ? kPerLoad<T> : 1;
  const int64_t n = m.outer * m.inner, pieces = n / kWidth;
  const int64_t end = (tile.row_end - tile.row_begin) * pieces;
  const float* v = at<const float>(header.v) + m.v_offset;
  const float* s = at<const float>(header.s) + m.s_offset + tile.row_begin;
  for (int64_t i = threadIdx.x; i < end; i += kThreads) {
    const int64_t row = i / pieces, c = i % pieces * kWidth;
    const int64_t place =
        row * m.row_stride + (m.outer == 1 ? c : column_offset(c, m.inner, m.outer_stride));
    Piece<Rule, T, M, kWidth> piece;
    piece.load(change, place);
    float sum[kWidth]{};
    for (int j = 0; j < factors.n; ++j) {
      const float a = (float)(factors.of[j] * s[j * m.rows + row]);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum[k] += a * v[j * n + c + k];
    }
    piece.step(change, place, 1, [&](int k, float) { return sum[k]; });
  }
}

// kSeveral: a cap holds several singular values; their products are another launch.
template <bool kSeveral, class Rule, class T, class M>
__device__ __forceinline__ void update_tile(const Header& header, const Update& update,
                                            int64_t index, int64_t shared_floats) {
  const Tile& tile = at<const Tile>(header.tiles)[index];
  const Matrix& m = at<const Matrix>(header.matrices)[tile.matrix];
  const Moment moment = at<const Moment>(update.matrix_moments)[tile.matrix];
  __shared__ double factor;
  const bool scales = update.constraint == kSphere;
  if (threadIdx.x == kThreads - 1) {
    const double sigma = at<const float>(header.sigmas)[tile.matrix];
    if (update.constraint == kFree)
      factor =
          capped_factor_of(gradient_factor(header, tile.matrix, sigma), sigma,
                           at<const float>(header.target)[tile.matrix], capping_lr(update, moment));
    else
      factor = scales ? 0 : held_factor(header, tile.matrix, update.constraint);
  }
  const Change<Rule, T, M>& change = change_of<Rule, T, M>(
      update, moment, arrays_at<T, M>(m.weight, m.grad, moment, tile.row_begin * m.row_stride),
      [&] { return scales ? held_factor(header, tile.matrix, update.constraint) : 0.0; });
  // A step that is skipped leaves the state as it is: the products with v again, which the caller
  // will take from v_next.
  const bool skipped = is_skipped(update);
  if (skipped && tile.row_begin == 0) {
    const float* v = at<const float>(header.v) + m.v_offset;
    float* v_next = at<float>(header.v_next) + m.v_offset;
    const int64_t size = header.r * m.outer * m.inner;
    for (int64_t c = threadIdx.x; c < size; c += kThreads) v_next[c] = v[c];
  }
  if constexpr (kSeveral) {
    __shared__ Factors several;
    if (threadIdx.x == 0) find_factors(header, tile.matrix, several);
    __syncthreads();
    if (!change.acts) return;
    if (is_aligned<T>(m.weight, m.row_stride, m.outer * m.inner, m.outer) &&
        are_aligned(m.weight, m.grad, moment))
      capped_rows<true>(header, m, tile, change, several);
    else
      capped_rows<false>(header, m, tile, change, several);
    return;
  }
  const Operands operands = operands_of(header, tile, m, skipped ? header.v : header.v_next);
  const double squares = sum_over_block(updated_products<Rule, T, M>(
      header, m, tile, moment, change, factor, operands, shared_floats));
  if (threadIdx.x == 0) at<double>(header.gram_partial)[index] = squares;
}

// The elements of a thread: kWidth from begin, begin + stride and so on, before end. The penalty's
// gradient of element i, p, is x(p, i).
template <int kWidth, class Rule, class T, class M, class X>
__device__ __forceinline__ void update_elements(const Change<Rule, T, M>& change, int64_t begin,
                                                int64_t end, int64_t stride, X x) {
  constexpr int kTogether = 2;  // pieces whose loads are in flight
  for (int64_t i = begin; i < end; i += kTogether * stride) {
    Piece<Rule, T, M, kWidth> piece[kTogether];
#pragma unroll
    for (int r = 0; r < kTogether; ++r)
      if (i + r * stride < end) piece[r].load(change, i + r * stride);
#pragma unroll
    for (int r = 0; r < kTogether; ++r)
      if (i + r * stride < end)
        piece[r].step(change, i + r * stride, 1,
                      [&](int j, float p) { return x(p, i + r * stride + j); });
  }
}

template <class Rule, class T, class M>
__device__ __forceinline__ void update_elementwise(const Header& header, const Update& update,
                                                   int64_t index) {
  const Elementwise entry = at<const Elementwise>(header.elementwise)[index];
  const Moment moment = at<const Moment>(update.elementwise_moments)[index];
  const Change<Rule, T, M>& change = change_of<Rule, T, M>(
      update, moment, arrays_at<T, M>(entry.weight, entry.grad, moment, 0), no_part);
  if (change.acts && entry.kind == kRows) {
    for_rows(
        entry, [&](int64_t i) { return (double)to_float(change.arrays.p[i]); },
        [&](int64_t row, double squares, int64_t first, int64_t step) {
          const double factor = row_factor(header, entry, index, row, squares,
                                           capping_lr(update, moment), update.constraint);
          const int64_t begin = row * entry.length;
          update_elements<1>(
              change, begin + first, begin + entry.length, step, [&](float p, int64_t) {
                const bool stays =
                    update.constraint != kFree && factor == 0;  // it may not be finite
                return stays ? 0.0f : (float)(factor * p);
              });
        });
  } else if (change.acts && update.constraint != kFree) {
    const HeldElements<float> held(strength_of(header, header.n_matrices + index),
                                   at<const float>(header.norm)[index], entry, update.constraint,
                                   header.above != 0);
    update_elements<1>(change, threadIdx.x, entry.size, kThreads,
                       [&](float p, int64_t i) { return (float)held.of(p, i); });
  } else if (change.acts) {
    const CappedGradient<float> gradient(elementwise_gradient_of(header, entry, index),
                                         capping_lr(update, moment));
    update_elements<1>(change, threadIdx.x, entry.size, kThreads,
                       [&](float p, int64_t i) { return (float)gradient.of(p, i); });
  }
  elementwise_norm<T>(header, index);  // whose threads read what they have written
}

template <class Rule, class T, class M>
__device__ __forceinline__ void update_other(const Update& update, int64_t index) {
  const Elementwise other = at<const Elementwise>(update.others)[index];
  const Moment moment = at<const Moment>(update.other_moments)[index];
  const Change<Rule, T, M>& change = change_of<Rule, T, M>(
      update, moment, arrays_at<T, M>(other.weight, other.grad, moment, 0), no_part);
  if (!change.acts) return;
  const bool aligned = are_aligned(other.weight, other.grad, moment);
  const int64_t wide = aligned ? other.size - other.size % kPerLoad<T> : 0;
  const auto none = [](float, int64_t) { return 0.0f; };
  constexpr int kWidth = kPerLoad<T>;
  update_elements<kWidth>(change, threadIdx.x * kWidth, wide, kThreads * kWidth, none);
  update_elements<1>(change, wide + threadIdx.x, other.size, kThreads, none);
}

// Block i < n_tiles takes tile i, the following n_elementwise blocks an elementwise parameter each,
// the n_others after them one of the others.
template <bool kSeveral, class Rule, class T, class M>
__global__ void __launch_bounds__(kThreads, 2)
    update_kernel(const Header header, const Update update, int64_t shared_floats) {
  int64_t block = blockIdx.x;
  if (block < header.n_tiles)
    return update_tile<kSeveral, Rule, T, M>(header, update, block, shared_floats);
  block -= header.n_tiles;
  if (block < header.n_elementwise) return update_elementwise<Rule, T, M>(header, update, block);
  update_other<Rule, T, M>(update, block - header.n_elementwise);
}

template <bool kSeveral, class Rule, class T, class M>
void launch_update(const Header& header, const Update& update, int device, int64_t stream) {
  const int64_t bytes = bytes_for_t(header, device, "update");
  launch<Header, Update, int64_t>("update", update_kernel<kSeveral, Rule, T, M>,
                                  header.n_tiles + header.n_elementwise + update.n_others, kThreads,
                                  bytes, stream, header, update, bytes / (int64_t)sizeof(float));
}

template <bool kSeveral, class Rule, class T>
void launch_narrow(const Header& header, const Update& update, int device, int64_t stream) {
  if (update.moment_dtype == kFloat32)
    launch_update<kSeveral, Rule, T, float>(header, update, device, stream);
  else
    launch_update<kSeveral, Rule, T, T>(header, update, device, stream);
}

template <class Rule, bool kSeveral = false>
void launch_rule(const Header& header, const Update& update, int device, int64_t stream) {
  if (header.weight_dtype == kFloat32)
    launch_update<kSeveral, Rule, float, float>(header, update, device, stream);
  else if (header.weight_dtype == kBFloat16)
    launch_narrow<kSeveral, Rule, __nv_bfloat16>(header, update, device, stream);
  else
    launch_narrow<kSeveral, Rule, __half>(header, update, device, stream);
}

// Whether a cap holds several singular values of a matrix.
inline bool caps_several(const Header& header, const Update& update) {
  return update.constraint == kCap && header.r > 1;
}

}  // namespace

}  // namespace cuda
}  // namespace spectral
