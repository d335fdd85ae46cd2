// Rayleigh-Ritz and a new basis, for several vectors per matrix.
//
// The small matrices are float64 and lie in scratch memory, for they are too large for a small
// stack. Arrays of vectors are [r, n], one vector after the other.
#pragma once

#include "../rounding.h"
#include "isa.h"
#include "scalar_math.h"
#include "simd.h"
#include "tiles.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

// An r x r matrix.
struct Small {
  double a[kMaxVectors][kMaxVectors];
  SPECTRAL_INLINE double* operator[](int64_t i) { return a[i]; }
  SPECTRAL_INLINE const double* operator[](int64_t i) const { return a[i]; }
  void set_zero(int r) {
    for (int i = 0; i < r; ++i)
      for (int j = 0; j < r; ++j) a[i][j] = 0;
  }
};

// Columns of vectors, in float64.
using Block = double[kMaxVectors][kBlock];

// Gram-Schmidt on candidates, unit vectors or zero, given by their inner products alone.
struct Basis {
  static constexpr int kMost = 2 * kMaxVectors;
  int count;                        // candidates
  int found;                        // vectors of the basis
  double products[kMost][kMost];    // of the candidates
  double c[kMaxVectors][kMost];     // coefficients of the basis over the candidates
  double with[kMaxVectors][kMost];  // its products with the candidates

  void begin(int n_candidates) {
    count = n_candidates;
    found = 0;
  }

  // Makes candidate `which` the next vector; returns false, and adds zero, if it depends on earlier
  // ones.
  bool take(int which) {
    double row[kMost] = {}, row_with[kMost] = {};
    row[which] = 1;
    // A second pass removes rounding errors.
    for (int turn = 0; turn < 2; ++turn)
      for (int k = 0; k < found; ++k) {
        double product = 0;
        for (int i = 0; i < count; ++i) product += row[i] * with[k][i];
        for (int i = 0; i < count; ++i) row[i] -= product * c[k][i];
      }
    for (int j = 0; j < count; ++j)
      if (row[j] != 0)
        for (int i = 0; i < count; ++i) row_with[i] += products[j][i] * row[j];
    double pivot = 0;
    for (int i = 0; i < count; ++i) pivot += row[i] * row_with[i];
    const double inverse = pivot > kSmallestPivot ? 1 / __builtin_sqrt(pivot) : 0;
    for (int i = 0; i < count; ++i) {
      c[found][i] = row[i] * inverse;
      with[found][i] = row_with[i] * inverse;
    }
    found += inverse > 0;
    return inverse > 0;
  }

  // Adds a zero vector.
  void leave_out() {
    for (int i = 0; i < count; ++i) c[found][i] = with[found][i] = 0;
    ++found;
  }
};

// Intermediate results for one matrix.
struct Ritz {
  Small products, q, gram, ct, cv, half;
  Basis basis;
  f64v sum[kMaxVectors][kMaxVectors];
  Block block[2];
};
static_assert(sizeof(Ritz) <= kRitzBytes && alignof(Ritz) <= kLine, "see Scratch");

// x x^T of vectors x.
template <class S>
void gram_of(const S* x, int64_t n, int r, Ritz& ritz) {
  constexpr int kLanes = Simd<double>::kLanes;
  f64v(&sum)[kMaxVectors][kMaxVectors] = ritz.sum;
  Block& block = ritz.block[0];
  for (int j = 0; j < r; ++j)
    for (int k = 0; k <= j; ++k) sum[j][k] = f64v{};
  for (int64_t c = 0; c < n; c += kBlock) {
    for (int j = 0; j < r; ++j)
      for (int i = 0; i < kBlock; ++i) block[j][i] = c + i < n ? (double)x[j * n + c + i] : 0;
    for (int j = 0; j < r; ++j)
      for (int k = 0; k <= j; ++k)
        for (int i = 0; i < kBlock; i += kLanes)
          sum[j][k] += load_bits<f64v>(block[j] + i) * load_bits<f64v>(block[k] + i);
  }
  for (int j = 0; j < r; ++j)
    for (int k = 0; k <= j; ++k) ritz.gram[j][k] = ritz.gram[k][j] = sum_lanes(sum[j][k]);
}

// out[j] = sum over i of c[j][i] x[i] + d[j][i] y[i], which may be x itself; y may be null.
template <class S>
void combine(const Small& c, const S* x, const Small& d, const S* y, int64_t n, int r, S* out,
             Block (&block)[2]) {
  constexpr int kLanes = Simd<double>::kLanes;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t width = n - first < kBlock ? n - first : kBlock;
    for (int which = 0; which < (y == nullptr ? 1 : 2); ++which) {
      const S* from = (which == 0 ? x : y) + first;
      for (int j = 0; j < r; ++j)
        for (int i = 0; i < kBlock; ++i)
          block[which][j][i] = i < width ? (double)from[j * n + i] : 0;
    }
    for (int j = 0; j < r; ++j) {
      f64v sum[kBlock / kLanes] = {};
      for (int which = 0; which < (y == nullptr ? 1 : 2); ++which)
        for (int i = 0; i < r; ++i)
          for (int l = 0; l < kBlock / kLanes; ++l)
            sum[l] += load_bits<f64v>(block[which][i] + l * kLanes) * (which == 0 ? c : d)[j][i];
      double result[kBlock];
      for (int l = 0; l < kBlock / kLanes; ++l) store_bits(result + l * kLanes, sum[l]);
      for (int i = 0; i < width; ++i) out[j * n + first + i] = (S)result[i];
    }
  }
}

// Eigenvalues of a symmetric matrix without negative ones, largest first, and eigenvectors in the
// rows of q, by Jacobi rotations (Golub and Van Loan, "Matrix Computations", section 8.5). Products
// that are zero are never rotated: vectors of zeros stay apart from others.
void eigen(Small& h, int r, double* values, Small& q) {
  constexpr int kMaxSweeps = 20;
  constexpr double kNegligible =
      1e-32;  // square of an off-diagonal element, relative to the diagonal
  for (int i = 0; i < r; ++i) q[i][i] = 1;
  bool rotated = true;
  for (int sweep = 0; rotated && sweep < kMaxSweeps; ++sweep) {
    rotated = false;
    for (int i = 0; i < r; ++i)
      for (int j = i + 1; j < r; ++j) {
        const double x = h[i][j], both = __builtin_fabs(h[i][i] * h[j][j]);
        if (x == 0 || x * x <= kNegligible * both) continue;
        rotated = true;
        const double theta = (h[j][j] - h[i][i]) / (2 * x);
        const double root = __builtin_sqrt(theta * theta + 1);
        const double tangent = 1 / (theta >= 0 ? theta + root : theta - root);
        const double cosine = 1 / __builtin_sqrt(tangent * tangent + 1), sine = tangent * cosine;
        h[i][i] -= tangent * x;
        h[j][j] += tangent * x;
        h[i][j] = h[j][i] = 0;
        for (int k = 0; k < r; ++k) {
          const double a = q[i][k], b = q[j][k];
          q[i][k] = cosine * a - sine * b;
          q[j][k] = sine * a + cosine * b;
          if (k == i || k == j) continue;
          const double c = h[i][k], d = h[j][k];
          h[i][k] = h[k][i] = cosine * c - sine * d;
          h[j][k] = h[k][j] = sine * c + cosine * d;
        }
      }
  }
  for (int i = 0; i < r; ++i) values[i] = h[i][i];
  for (int i = 0; i < r; ++i) {
    int largest = i;
    for (int j = i + 1; j < r; ++j)
      if (values[j] > values[largest]) largest = j;
    if (largest == i) continue;
    const double value = values[i];
    values[i] = values[largest];
    values[largest] = value;
    for (int k = 0; k < r; ++k) {
      const double x = q[i][k];
      q[i][k] = q[largest][k];
      q[largest][k] = x;
    }
  }
}

// Coefficients ct over the vectors t and cv over the turned v of an orthonormal basis of the turned
// t. Where one of these depends on those before it, the turned v takes its place; where that does
// too, there is none (r > n), and the row is zero. q, squares: eigenvectors and values of s s^T;
// gram: t t^T; turned_norm: of the turned t; scale: what s was multiplied by.
void new_basis(const double* squares, const double* turned_norm, double scale, int r, Ritz& ritz) {
  Basis& basis = ritz.basis;
  const Small &q = ritz.q, &gram = ritz.gram;
  Small &ct = ritz.ct, &cv = ritz.cv, &half = ritz.half;  // half is q gram
  basis.begin(2 * r);
  half.set_zero(r);
  ct.set_zero(r);
  double inverse[kMaxVectors];
  for (int j = 0; j < r; ++j) {
    double reach = 0;
    for (int i = 0; i < r; ++i) {
      reach += __builtin_fabs(q[j][i]) * __builtin_sqrt(gram[i][i]);
      for (int k = 0; k < r; ++k) half[j][k] += q[j][i] * gram[i][k];
    }
    const bool sound = squares[j] > kZero * squares[0] && reach <= kMaxAmplified * turned_norm[j];
    inverse[j] = sound ? 1 / turned_norm[j] : 0;
  }
  // Candidates below r are the turned t as units, those above the turned v.
  for (int j = 0; j < r; ++j)
    for (int k = 0; k < r; ++k) {
      double product = 0;
      for (int i = 0; i < r; ++i) product += half[j][i] * q[k][i];
      basis.products[j][k] = product * inverse[j] * inverse[k];
      const double mixed = j == k ? scale * squares[j] * inverse[j] : 0;
      basis.products[j][r + k] = basis.products[r + k][j] = mixed;
      basis.products[r + j][r + k] = j == k;
    }
  for (int j = 0; j < r; ++j)
    if (inverse[j] == 0 || !basis.take(j))
      if (!basis.take(r + j)) basis.leave_out();
  for (int j = 0; j < r; ++j)
    for (int i = 0; i < r; ++i) {
      for (int k = 0; k < r; ++k) ct[j][i] += basis.c[j][k] * inverse[k] * q[k][i];
      cv[j][i] = basis.c[j][r + i];
    }
}

// Orthonormalizes vectors that are nearly orthonormal, or zero.
template <class S>
void orthonormalize(S* x, int64_t n, int r, Ritz& ritz) {
  Basis& basis = ritz.basis;
  Small& coefficients = ritz.ct;
  gram_of(x, n, r, ritz);
  basis.begin(r);
  for (int j = 0; j < r; ++j)
    for (int i = 0; i < r; ++i) basis.products[j][i] = ritz.gram[j][i];
  for (int j = 0; j < r; ++j) {
    if (!basis.take(j)) basis.leave_out();
    for (int i = 0; i < r; ++i) coefficients[j][i] = basis.c[j][i];
  }
  combine<S>(coefficients, x, coefficients, nullptr, n, r, x, ritz.block);
}

}  // namespace
}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
