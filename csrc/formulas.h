// The scalar mathematics that CPU and CUDA kernels share.
//
// Where this is included, SPECTRAL_FORMULA says how functions are compiled (inlined, and for which
// processor), and these functions of float64 exist: is_finite, bits_of, double_of, pow_of, sqrt_of,
// abs_of. No standard header is included: see cpu/simd.h. backends/formulas.py has the same in
// PyTorch, with derivations. All of it is float64 but for the rules of optimizers, whose S is the
// type of the state.
#pragma once

#include <stdint.h>

#include "table.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

SPECTRAL_FORMULA double power(double x, double k) {
  if (k == 2) return x * x;
  if (k == 1) return x;
  return pow_of(x, k);
}

// Returns e of sigma = m * 2^e with 1 <= m < 2; 0 where sigma is zero, not finite, or so extreme
// that 2^-e is no normal number. s is multiplied by 2^-e before it goes into t, so that t neither
// overflows nor vanishes; a power of two changes no digit of the result.
template <class S>
SPECTRAL_FORMULA int binary_exponent(S sigma) {
  if (!(sigma > 0) || !is_finite(sigma)) return 0;
  const int exponent = (int)(bits_of((double)sigma) >> 52) - 1023;
  if (sizeof(S) == 8 && (exponent <= -1022 || exponent >= 1022)) return 0;
  return exponent;
}

SPECTRAL_FORMULA double power_of_two(int e) {
  return double_of((uint64_t)(int64_t)(1023 + e) << 52);
}

// Returns whether an estimate is stale: calls with a tolerance are about stale matrices alone.
SPECTRAL_FORMULA bool is_stale(double tolerance, double residual, double sigma) {
  return residual > tolerance * sigma;
}

// By how much x^k exceeds what is wanted; with `above` what falls short of it counts as equal.
SPECTRAL_FORMULA double pulled(double excess, bool above) {
  return above && excess < 0 ? 0 : excess;
}

// R of a matrix: (sigma^k - tau^k)^2.
SPECTRAL_FORMULA double raw_penalty_of(double sigma, double target, double k, bool above) {
  const double excess = pulled(power(sigma, k) - power(target, k), above);
  return excess * excess;
}

// ||W^T u - sigma v|| = sqrt(||W^T u||^2 - sigma^2), from t_norm = scale * ||W^T s||.
SPECTRAL_FORMULA double residual_of(double sigma, double t_norm, double scale) {
  if (!is_finite(sigma) || !(sigma > 0)) return sigma;
  const double wtu = t_norm / (scale * sigma);
  const double squared = (wtu - sigma) * (wtu + sigma);
  return squared > 0 ? sqrt_of(squared) : squared <= 0 ? 0 : squared;
}

// What s is multiplied by: strength * 2 k (sigma^k - tau^k) sigma^(k-1) / sigma. At sigma = 0 there
// is no direction to move along: the gradient is zero.
SPECTRAL_FORMULA double gradient_factor_of(double sigma, double target, double strength, double k,
                                           bool above) {
  if (sigma == 0) return 0;
  return strength * 2 * k * pulled(power(sigma, k) - power(target, k), above) *
         power(sigma, k - 1) / sigma;
}

// Returns the larger number; NaN if one of them is.
SPECTRAL_FORMULA double larger(double x, double y) { return x > y || x != x ? x : y; }

// The targets of an elementwise parameter, in the state's type; null: there are none.
template <class S>
SPECTRAL_FORMULA const S* targets_of(const Elementwise& entry) {
  return reinterpret_cast<const S*>(entry.targets);
}

// (|x|^k - tau^k)^2 of element i of a gain.
template <class S>
SPECTRAL_FORMULA double gain_penalty_of(double x, const S* targets, int64_t i, double k,
                                        bool above) {
  const double excess =
      pulled(power(abs_of(x), k) - (targets == nullptr ? 1 : power(targets[i], k)), above);
  return excess * excess;
}

// R of a bias or shift, from the sum of its squares.
template <class S>
SPECTRAL_FORMULA double shift_penalty_of(double squares, const S* targets, double k, bool above) {
  return targets == nullptr ? power(squares, k)
                            : raw_penalty_of(sqrt_of(squares), *targets, k, above);
}

// strength * dR/dx of the elements of a bias, shift or gain, whose Euclidean norm is given.
template <class S>
struct ElementwiseGradient {
  double k, strength, norm, shift_factor;  // strength times 2 k
  const S* targets;
  bool is_shift, above;

  SPECTRAL_FORMULA ElementwiseGradient(double k, double strength, double norm,
                                       const Elementwise& entry, bool above)
      : k(k),
        strength(strength * 2 * k),
        norm(norm),
        targets(targets_of<S>(entry)),
        is_shift(entry.kind == kShift),
        above(above) {
    shift_factor = !is_shift || targets == nullptr
                       ? this->strength * power(norm, 2 * k - 2)
                       : gradient_factor_of(norm, *targets, strength, k, above);
  }

  // Of element i, x.
  SPECTRAL_FORMULA double of(double x, int64_t i) const {
    if (is_shift) return shift_factor * x;
    const double magnitude = abs_of(x);
    const double least = targets == nullptr ? 1 : power(targets[i], k);
    return x == 0 ? 0
                  : strength * pulled(power(magnitude, k) - least, above) *
                        power(magnitude, k - 1) * (x > 0 ? 1 : -1);
  }
};

// Returns value, or with its sign the largest one for which lr * |value| is not above most.
SPECTRAL_FORMULA double capped(double value, double most, double lr) {
  if (!(lr * abs_of(value) > most)) return value;
  return (value > 0 ? most : -most) / lr;
}

// gradient_factor_of, capped: W - lr * (factor * s) v^T has sigma carried to the target at most.
// See Matrix for reach.
SPECTRAL_FORMULA double capped_factor_of(double factor, double sigma, double target, double lr,
                                         int64_t reach = 1) {
  return capped(factor, abs_of(sigma - target) / ((double)reach * sigma), lr);
}

// With what part of itself, or of its s v^T, a matrix of that sigma is brought to its target by a
// constraint: (sigma - tau) / sigma; 0: it stays as it is. A sigma that is zero beside the target
// has no direction to move along.
// A step takes at most all but a millionth of a huge one: more would be lost in rounding.
SPECTRAL_FORMULA double held_factor_of(double sigma, double target, double strength,
                                       int64_t constraint, bool above) {
  constexpr double kZero = 1e-30, kMost = 1 - 1e-6;
  if (strength == 0 || !is_finite(sigma) || !(sigma > kZero * target)) return 0;
  const double part = pulled(sigma - target, above || constraint == kCap) / sigma;
  return part < kMost ? part : kMost;
}

// How the penalty acts on a row.
struct RowPull {
  double k, lr;  // lr: 0, or the learning rate that the gradient is capped for
  bool above;
  int64_t constraint;  // in place of the gradient
};

// What a row is multiplied by, capped or held; its squares are summed up.
SPECTRAL_FORMULA double row_factor_of(double squares, double target, double strength,
                                      const RowPull& pull) {
  const double norm = sqrt_of(squares);
  if (pull.constraint != kFree)  // with a target of 0 it is a bias, which has no bound
    return target == 0 ? 0 : held_factor_of(norm, target, strength, pull.constraint, pull.above);
  return capped_factor_of(gradient_factor_of(norm, target, strength, pull.k, pull.above), norm,
                          target, pull.lr);
}

// ElementwiseGradient, capped: x - lr * of(x) is carried to the target at most.
template <class S>
struct CappedGradient {
  ElementwiseGradient<S> gradient;
  double lr;

  SPECTRAL_FORMULA CappedGradient(const ElementwiseGradient<S>& plain, double lr)
      : gradient(plain), lr(lr) {
    if (!gradient.is_shift) return;
    const bool is_default = gradient.targets == nullptr;
    const double most = is_default ? 1 : abs_of(gradient.norm - *gradient.targets) / gradient.norm;
    gradient.shift_factor = capped(gradient.shift_factor, most, lr);
  }

  SPECTRAL_FORMULA double of(double x, int64_t i) const {
    if (gradient.is_shift) return gradient.of(x, i);
    const double target = gradient.targets == nullptr ? 1 : (double)gradient.targets[i];
    return capped(gradient.of(x, i), abs_of(abs_of(x) - target), lr);
  }
};

// What a constraint takes from the elements of a bias, shift or gain: those of a gain are singular
// values; a bias is capped, if it has a target.
template <class S>
struct HeldElements {
  const S* targets;
  double strength, factor;  // of a bias
  int64_t constraint;
  bool is_shift, above;

  SPECTRAL_FORMULA HeldElements(double strength, double norm, const Elementwise& entry,
                                int64_t constraint, bool above)
      : targets(targets_of<S>(entry)),
        strength(strength),
        factor(0),
        constraint(constraint),
        is_shift(entry.kind == kShift),
        above(above) {
    if (is_shift && targets != nullptr)
      factor = held_factor_of(norm, *targets, strength, kCap, above);
  }

  // From element i, x.
  SPECTRAL_FORMULA double of(double x, int64_t i) const {
    const double target = is_shift || targets == nullptr ? 1 : (double)targets[i];
    const double own =
        is_shift ? factor : held_factor_of(abs_of(x), target, strength, constraint, above);
    return own == 0 ? 0 : own * x;
  }
};

// The rules as in torch.optim: change p and the moments m1, m2 by the gradient g. V is a number or
// several side by side; Math has the processor's square root and quotient.

template <class S, class Math>
struct AdamW {
  static constexpr int kMoments = 2;
  static constexpr bool kInParts = true;  // begin, change_of and end
  static constexpr bool kScales = true;   // shrink
  S keep, weight1, beta2, weight2, step_size, inverse_root, eps;

  AdamW() = default;
  SPECTRAL_FORMULA AdamW(const Group& group, double step)
      : keep((S)(1 - group.lr * group.weight_decay)),
        weight1((S)(1 - group.option_1)),
        beta2((S)group.option_2),
        weight2((S)(1 - group.option_2)),
        step_size((S)(group.lr / (1 - pow_of(group.option_1, step)))),
        inverse_root((S)(1 / sqrt_of(1 - pow_of(group.option_2, step)))),
        eps((S)group.eps) {}

  // Let the step take `part` of the weights too.
  SPECTRAL_FORMULA void shrink(double part) { keep = (S)(keep - part); }

  template <class V>
  SPECTRAL_FORMULA void operator()(V& p, V g, V& m1, V& m2) const {
    const V root = begin(g, m1, m2);
    end(p, change_of(m1, root));
  }

  // Changes the moments; returns the root of the second one.
  template <class V>
  SPECTRAL_FORMULA V begin(V g, V& m1, V& m2) const {
    m1 += weight1 * (g - m1);
    m2 = beta2 * m2 + weight2 * g * g;
    return Math::root_of(m2);
  }

  // Returns what end() takes from the weights.
  template <class V>
  SPECTRAL_FORMULA V change_of(V m1, V root) const {
    return Math::quotient_of(step_size * m1, root * inverse_root + eps);
  }

  template <class V>
  SPECTRAL_FORMULA void end(V& p, V change) const {
    p = keep * p - change;
  }
};

template <class S, class Math>
struct Sgd {
  static constexpr int kMoments = 1;  // none is stored without momentum
  static constexpr bool kInParts = false, kScales = false;
  S lr, weight_decay, momentum, weight;
  bool nesterov;

  Sgd() = default;
  SPECTRAL_FORMULA Sgd(const Group& group, double step)
      : lr((S)group.lr),
        weight_decay((S)group.weight_decay),
        momentum((S)group.option_1),
        weight((S)(step > 1 && group.option_1 != 0 ? 1 - group.option_2 : 1)),
        nesterov(group.nesterov != 0) {}

  template <class V>
  SPECTRAL_FORMULA void operator()(V& p, V g, V& m1, V&) const {
    g += weight_decay * p;
    V direction = g;
    if (momentum != 0) {  // without it an earlier buffer stays as it is
      m1 = momentum * m1 + weight * g;
      direction = nesterov ? g + momentum * m1 : m1;
    }
    p -= lr * direction;
  }
};

// A rule of its own: in Sgd, one more term would change which products compilers fuse with sums.
template <class S, class Math>
struct SgdOnSphere : Sgd<S, Math> {
  static constexpr bool kScales = true;
  S part;

  SgdOnSphere() = default;
  SPECTRAL_FORMULA SgdOnSphere(const Group& group, double step)
      : Sgd<S, Math>(group, step), part(0) {}

  // See AdamW.
  SPECTRAL_FORMULA void shrink(double part) { this->part = (S)part; }

  template <class V>
  SPECTRAL_FORMULA void operator()(V& p, V g, V& m1, V& m2) const {
    const V before = p;
    Sgd<S, Math>::operator()(p, g, m1, m2);
    if (part != 0) p -= part * before;
  }
};

}  // namespace
}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
