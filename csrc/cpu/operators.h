// The next v of a convolution taken as an operator: Newton's method for its frequency, and the
// vector that goes with it. backends/operators.py has the same in PyTorch, with derivations.
#pragma once

#include "isa.h"
#include "scalar_math.h"
#include "simd.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

constexpr int kDims = 3;
constexpr int kTrials = 2;  // steps that are tried, each a quarter of the one before
constexpr double kHalfPi = 1.57079632679489661923;

SPECTRAL_INLINE void add(Complex& sum, double x, Complex y) {
  sum.re += x * y.re;
  sum.im += x * y.im;
}

SPECTRAL_INLINE double square_of(Complex x) { return x.re * x.re + x.im * x.im; }

// Real and imaginary part of conj(x) y.
SPECTRAL_INLINE double real_of(Complex x, Complex y) { return x.re * y.re + x.im * y.im; }
SPECTRAL_INLINE double imaginary_of(Complex x, Complex y) { return x.re * y.im - x.im * y.re; }

// ||A||^2 and its derivatives by the frequency.
struct Height {
  double square = 0, gradient[kDims] = {}, hessian[kDims][kDims] = {};
};

// Solves (shift - H) x = g by Cholesky's method; returns false if the matrix is not positive
// definite. Dimensions with a count of 1 have no frequency: x is 0.
SPECTRAL_INLINE bool solve(const Height& height, const int64_t* count, double shift, double* x) {
  double lower[kDims][kDims];
  for (int j = 0; j < kDims; ++j) {
    for (int k = 0; k <= j; ++k) {
      double sum = (j == k ? shift : 0) - height.hessian[j][k];
      if (j == k && count[j] == 1) sum = 1;
      for (int i = 0; i < k; ++i) sum -= lower[j][i] * lower[k][i];
      if (k < j)
        lower[j][k] = sum / lower[k][k];
      else if (sum > 0)
        lower[j][j] = __builtin_sqrt(sum);
      else
        return false;
    }
    x[j] = height.gradient[j];
    for (int i = 0; i < j; ++i) x[j] -= lower[j][i] * x[i];
    x[j] /= lower[j][j];
  }
  for (int j = kDims - 1; j >= 0; --j) {
    for (int i = j + 1; i < kDims; ++i) x[j] -= lower[i][j] * x[i];
    x[j] /= lower[j][j];
  }
  return true;
}

// The kernel of an operator, with n columns; `waves` is scratch memory.
template <class S>
struct Kernel {
  const Operator& op;
  const Tap* taps;
  int64_t n;
  Complex* waves;  // e^(i q theta) of every tap

  void set_waves(const double* theta) const {
    for (int64_t i = 0; i < op.n_taps; ++i) {
      double angle = 0;
      for (int d = 0; d < kDims; ++d) angle += (double)taps[i].number[d] * theta[d];
      waves[i] = {__builtin_cos(angle), __builtin_sin(angle)};
    }
  }

  SPECTRAL_INLINE Complex at(const S* x, int64_t i) const {
    return {(double)x[i], (double)x[n + i]};
  }

  // The number at a tap times the conjugate of its wave.
  SPECTRAL_INLINE Complex turned(const S* own, int64_t i) const {
    const Complex x = at(own, taps[i].column), wave = waves[i];
    return {x.re * wave.re + x.im * wave.im, x.im * wave.re - x.re * wave.im};
  }

  // Of v: the angle between taps that follow each other; 0 where v does not depend on it.
  void frequency(const S* v, double* theta) const {
    for (int d = 0; d < kDims; ++d) {
      theta[d] = 0;
      if (op.count[d] == 1) continue;
      Complex sum{};
      for (int64_t c = 0; c < op.channels; ++c) {
        const S* own = v + c * op.channel_stride;
        for (int64_t i = 0; i < op.n_taps; ++i) {
          if (taps[i].next[d] == 0) continue;
          const Complex x = at(own, taps[i].column), y = at(own, taps[i].column + taps[i].next[d]);
          sum.re += real_of(x, y);
          sum.im += imaginary_of(x, y);
        }
      }
      theta[d] = __builtin_atan2(sum.im, sum.re);
    }
  }

  // ||A||^2 of t with the present waves.
  double square(const S* t) const {
    double sum = 0;
    for (int64_t c = 0; c < op.channels; ++c) {
      const S* own = t + c * op.channel_stride;
      Complex a{};
      for (int64_t i = 0; i < op.n_taps; ++i) {
        add(a, 1, turned(own, i));
        if (taps[i].is_last) sum += square_of(a), a = {};
      }
    }
    return sum;
  }

  // The same with its derivatives: A = sum of y over the taps of a phase, y = t e^(-i q theta), has
  // the derivatives -i sum of q y and -sum of q q y.
  Height height(const S* t) const {
    Height found;
    for (int64_t c = 0; c < op.channels; ++c) {
      const S* own = t + c * op.channel_stride;
      Complex a{}, first[kDims]{}, second[kDims][kDims]{};
      for (int64_t i = 0; i < op.n_taps; ++i) {
        const Tap& tap = taps[i];
        const Complex y = turned(own, i);
        add(a, 1, y);
        for (int j = 0; j < kDims; ++j) {
          const double q = (double)tap.number[j];
          add(first[j], q, y);
          for (int k = 0; k <= j; ++k) add(second[j][k], q * (double)tap.number[k], y);
        }
        if (!tap.is_last) continue;
        found.square += square_of(a);
        for (int j = 0; j < kDims; ++j) {
          found.gradient[j] += 2 * imaginary_of(a, first[j]);
          for (int k = 0; k <= j; ++k)
            found.hessian[j][k] += 2 * (real_of(first[j], first[k]) - real_of(a, second[j][k]));
        }
        a = {};
        for (int j = 0; j < kDims; ++j) {
          first[j] = {};
          for (int k = 0; k <= j; ++k) second[j][k] = {};
        }
      }
    }
    return found;
  }

  // Newton's step towards a maximum, at most pi / (2 taps) along each dimension; where the Hessian
  // is not negative definite, a multiple of the identity makes it so.
  bool newton_step(const Height& height, double* step) const {
    double norm = 0, most = 1;
    for (int j = 0; j < kDims; ++j)
      for (int k = 0; k < kDims; ++k) {
        const double h = height.hessian[j > k ? j : k][j > k ? k : j];
        norm += h * h;
      }
    if (!solve(height, op.count, 0, step) &&
        !solve(height, op.count, 2 * __builtin_sqrt(norm), step))
      return false;
    for (int d = 0; d < kDims; ++d) {
      const double relative = abs_of(step[d]) * (double)op.count[d] / kHalfPi;
      most = relative > most ? relative : most;
    }
    for (int d = 0; d < kDims; ++d) step[d] /= most;
    return true;
  }

  // Reads t in v_next, [2, n], and writes the vector after v there. Returns whether it is finite;
  // `t_norm` is the norm of A at the frequency of v.
  bool next(const S* v, S* v_next, double& t_norm) const {
    double theta[kDims], step[kDims] = {};
    frequency(v, theta);
    set_waves(theta);
    const Height height = this->height(v_next);
    double square = height.square;
    t_norm = __builtin_sqrt(square);
    bool is_better = newton_step(height, step);
    if (is_better) {
      is_better = false;
      for (int trial = 0; trial < kTrials && !is_better; ++trial) {
        double other[kDims];
        for (int d = 0; d < kDims; ++d) other[d] = theta[d] + step[d];
        set_waves(other);
        const double found = this->square(v_next);
        is_better = found > square;
        if (is_better) square = found;
        for (int d = 0; d < kDims; ++d) step[d] /= 4;
      }
      if (!is_better) set_waves(theta);
    }
    const double inverse = 1 / __builtin_sqrt(square);
    if (!(square > 0) || !is_finite(inverse) || inverse == 0) return false;
    write(v_next, inverse);
    return true;
  }

  // Overwrites t by v: in every channel and phase, inverse * A times the waves.
  void write(S* x, double inverse) const {
    for (int64_t c = 0; c < op.channels; ++c) {
      S* own = x + c * op.channel_stride;
      Complex a{};
      int64_t first = 0;
      for (int64_t i = 0; i < op.n_taps; ++i) {
        add(a, inverse, turned(own, i));
        if (!taps[i].is_last) continue;
        for (int64_t j = first; j <= i; ++j) {
          const Complex wave = waves[j];
          own[taps[j].column] = (S)(a.re * wave.re - a.im * wave.im);
          own[n + taps[j].column] = (S)(a.re * wave.im + a.im * wave.re);
        }
        a = {};
        first = i + 1;
      }
    }
  }
};

}  // namespace
}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
