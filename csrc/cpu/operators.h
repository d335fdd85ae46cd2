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

struct Complex {
  double re, im;
  SPECTRAL_INLINE void add(double x, Complex y) {
    re += x * y.re;
    im += x * y.im;
  }
};

SPECTRAL_INLINE double square_of(Complex x) { return x.re * x.re + x.im * x.im; }

// Real and imaginary part of conj(x) y.
SPECTRAL_INLINE double real_of(Complex x, Complex y) { return x.re * y.re + x.im * y.im; }
SPECTRAL_INLINE double imaginary_of(Complex x, Complex y) { return x.re * y.im - x.im * y.re; }

// ||A||^2 and its derivatives by the frequency.
struct Height {
  double square = 0, gradient[kDims] = {}, hessian[kDims][kDims] = {};
};

// Solves (shift - H) x = g by Cholesky's method for the dimensions of a frequency, of which there
// are n; returns false if the matrix is not positive definite.
SPECTRAL_INLINE bool solve(const Height& height, const int* dims, int n, double shift, double* x) {
  double lower[kDims][kDims];
  for (int j = 0; j < n; ++j) {
    for (int k = 0; k <= j; ++k) {
      double sum = (j == k ? shift : 0) - height.hessian[dims[j]][dims[k]];
      for (int i = 0; i < k; ++i) sum -= lower[j][i] * lower[k][i];
      if (k < j)
        lower[j][k] = sum / lower[k][k];
      else if (sum > 0)
        lower[j][j] = __builtin_sqrt(sum);
      else
        return false;
    }
    x[j] = height.gradient[dims[j]];
    for (int i = 0; i < j; ++i) x[j] -= lower[j][i] * x[i];
    x[j] /= lower[j][j];
  }
  for (int j = n - 1; j >= 0; --j) {
    for (int i = j + 1; i < n; ++i) x[j] -= lower[i][j] * x[i];
    x[j] /= lower[j][j];
  }
  return true;
}

// The taps of a kernel with n columns, in scratch memory.
template <class S>
struct Kernel {
  const Operator& op;
  const int64_t n;
  Tap* const taps;
  int64_t n_taps = 0;
  int dims[kDims], n_dims = 0;  // those along which a phase has several taps

  Kernel(const Operator& op, int64_t n, Tap* taps) : op(op), n(n), taps(taps) {
    for (int d = 0; d < kDims; ++d)
      if (op.size[d] > op.period[d]) dims[n_dims++] = d;
    int64_t phase[kDims], number[kDims];
    for (phase[0] = 0; phase[0] < phases(0); ++phase[0])
      for (phase[1] = 0; phase[1] < phases(1); ++phase[1])
        for (phase[2] = 0; phase[2] < phases(2); ++phase[2]) {
          for (number[0] = 0; number[0] < count(0, phase[0]); ++number[0])
            for (number[1] = 0; number[1] < count(1, phase[1]); ++number[1])
              for (number[2] = 0; number[2] < count(2, phase[2]); ++number[2]) {
                Tap& tap = taps[n_taps++];
                tap.column = tap.is_last = 0;
                for (int d = 0; d < kDims; ++d) {
                  tap.column += (phase[d] + number[d] * op.period[d]) * op.stride[d];
                  tap.number[d] = (double)number[d];
                }
              }
          taps[n_taps - 1].is_last = 1;
        }
  }

  int64_t phases(int d) const { return op.size[d] < op.period[d] ? op.size[d] : op.period[d]; }
  int64_t count(int d, int64_t phase) const {
    return (op.size[d] - phase + op.period[d] - 1) / op.period[d];
  }

  void set_waves(const double* theta) const {
    for (int64_t i = 0; i < n_taps; ++i) {
      double angle = 0;
      for (int d = 0; d < kDims; ++d) angle += taps[i].number[d] * theta[d];
      taps[i].re = __builtin_cos(angle);
      taps[i].im = __builtin_sin(angle);
    }
  }

  SPECTRAL_INLINE static Complex at(const S* x, int64_t n, int64_t i) {
    return {(double)x[i], (double)x[n + i]};
  }

  // x times the conjugate of a tap's wave.
  SPECTRAL_INLINE static Complex turned(Complex x, const Tap& tap) {
    return {x.re * tap.re + x.im * tap.im, x.im * tap.re - x.re * tap.im};
  }

  // Of v: the angle between taps that follow each other; 0 where v does not depend on it.
  void frequency(const S* v, double* theta) const {
    for (int d = 0; d < kDims; ++d) theta[d] = 0;
    for (int i = 0; i < n_dims; ++i) {
      const int d = dims[i];
      const int64_t step = op.period[d] * op.stride[d];
      Complex sum{};
      for (int64_t c = 0; c < op.channels; ++c)
        for (int64_t j = 0; j < n_taps; ++j) {
          const int64_t column = c * op.channel_stride + taps[j].column;
          const int64_t place = taps[j].column / op.stride[d] % op.size[d];
          if (place + op.period[d] >= op.size[d]) continue;
          const Complex x = at(v, n, column), y = at(v, n, column + step);
          sum.re += real_of(x, y);
          sum.im += imaginary_of(x, y);
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
      for (int64_t i = 0; i < n_taps; ++i) {
        a.add(1, turned(at(own, n, taps[i].column), taps[i]));
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
      for (int64_t i = 0; i < n_taps; ++i) {
        const Tap& tap = taps[i];
        const Complex y = turned(at(own, n, tap.column), tap);
        a.add(1, y);
        for (int j = 0; j < n_dims; ++j) {
          const double q = tap.number[dims[j]];
          first[j].add(q, y);
          for (int k = 0; k <= j; ++k) second[j][k].add(q * tap.number[dims[k]], y);
        }
        if (!tap.is_last) continue;
        found.square += square_of(a);
        for (int j = 0; j < n_dims; ++j) {
          found.gradient[dims[j]] += 2 * imaginary_of(a, first[j]);
          for (int k = 0; k <= j; ++k)
            found.hessian[dims[j]][dims[k]] +=
                2 * (real_of(first[j], first[k]) - real_of(a, second[j][k]));
        }
        a = {};
        for (int j = 0; j < n_dims; ++j) {
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
    double x[kDims], norm = 0;
    for (int j = 0; j < n_dims; ++j)
      for (int k = 0; k < n_dims; ++k) {
        const double h = height.hessian[dims[j > k ? j : k]][dims[j > k ? k : j]];
        norm += h * h;
      }
    if (!solve(height, dims, n_dims, 0, x) &&
        !solve(height, dims, n_dims, 2 * __builtin_sqrt(norm), x))
      return false;
    double most = 1;
    for (int j = 0; j < n_dims; ++j) {
      const double relative = abs_of(x[j]) * (double)count(dims[j], 0) / kHalfPi;
      most = relative > most ? relative : most;
    }
    for (int j = 0; j < n_dims; ++j) step[dims[j]] = x[j] / most;
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
    bool is_better = n_dims > 0 && newton_step(height, step);
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
      for (int64_t i = 0; i < n_taps; ++i) {
        a.add(inverse, turned(at(own, n, taps[i].column), taps[i]));
        if (!taps[i].is_last) continue;
        for (int64_t j = first; j <= i; ++j) {
          const Tap& tap = taps[j];
          own[tap.column] = (S)(a.re * tap.re - a.im * tap.im);
          own[n + tap.column] = (S)(a.re * tap.im + a.im * tap.re);
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
