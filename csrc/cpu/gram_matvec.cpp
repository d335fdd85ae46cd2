// s = W v and t = W^T s of every tile, and the stage that computes sigma and the next v from them.

#include "elementwise.h"
#include "isa.h"
#include "operators.h"
#include "ritz.h"
#include "scalar_math.h"
#include "tile_products.h"
#include "tiles.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

// Results of normalize for one matrix: one or r values each, the largest first.
struct Estimates {
  double sigma[kMaxVectors];
  double t_norm[kMaxVectors];  // norms of the corresponding t
};

// The next v of an operator; `squares` are those of s.
template <class S>
void next_wave(const Header& header, const Matrix& m, const Operator& op, double squares,
               const Scratch& scratch, Estimates& found) {
  const int64_t n = m.outer * m.inner;
  found.sigma[0] = __builtin_sqrt(squares);
  if (header.t_partial == 0) return;
  const S* v = reinterpret_cast<const S*>(header.v) + m.v_offset;
  S* v_next = reinterpret_cast<S*>(header.v_next) + m.v_offset;
  for (int j = 0; j < 2; ++j) reduce_tiles(header, m, j * n, v_next + j * n, n);
  const Kernel<S> kernel{op, reinterpret_cast<const Tap*>(header.taps) + op.first_tap, n,
                         reinterpret_cast<Complex*>(scratch.ritz)};
  const bool good = kernel.next(v, v_next, found.t_norm[0]) && is_finite(found.sigma[0]);
  if (!good)
    for (int64_t c = 0; c < 2 * n; ++c) v_next[c] = v[c];
}

// The next v is t / ||t||.
template <class S>
void next_vector(const Header& header, const Matrix& m, double squares, Estimates& found) {
  const int64_t n = m.outer * m.inner;
  found.sigma[0] = __builtin_sqrt(squares);
  if (header.t_partial == 0) return;
  const S* v = reinterpret_cast<const S*>(header.v) + m.v_offset;
  S* v_next = reinterpret_cast<S*>(header.v_next) + m.v_offset;
  const double t_norm = __builtin_sqrt(reduce_tiles(header, m, 0, v_next, n));
  const bool good = is_finite(t_norm) && t_norm > 0 && is_finite(found.sigma[0]);
  const double inverse = 1 / t_norm;
  for (int64_t c = 0; c < n; ++c) v_next[c] = good ? (S)(v_next[c] * inverse) : v[c];
  found.t_norm[0] = t_norm;
}

// Rotates v and s to the Ritz vectors; the next v is an orthonormal basis of the rotated t.
template <class S>
void next_vectors(const Header& header, const Matrix& m, double scale, Ritz& ritz,
                  Estimates& found) {
  const int64_t n = m.outer * m.inner;
  const int r = (int)header.r;
  double trace = 0, squares[kMaxVectors];
  for (int i = 0; i < r; ++i) trace += ritz.products[i][i];
  const bool finite = is_finite(trace);
  Small& q = ritz.q;
  q.set_zero(r);
  if (finite) eigen(ritz.products, r, squares, q);
  for (int i = 0; i < r; ++i) {
    if (!finite) squares[i] = trace, q[i][i] = 1;
    const bool is_rounding = finite && squares[i] <= kZero * squares[0];
    found.sigma[i] = is_rounding ? 0 : __builtin_sqrt(squares[i]);
  }
  if (header.t_partial == 0) return;

  S* v = reinterpret_cast<S*>(header.v) + m.v_offset;
  S* v_next = reinterpret_cast<S*>(header.v_next) + m.v_offset;
  for (int j = 0; j < r; ++j) reduce_tiles(header, m, j * n, v_next + j * n, n);
  gram_of(v_next, n, r, ritz);
  bool good = finite;
  for (int j = 0; j < r; ++j) {
    double square = 0;
    for (int i = 0; i < r; ++i)
      for (int k = 0; k < r; ++k) square += q[j][i] * ritz.gram[i][k] * q[j][k];
    found.t_norm[j] = square > 0 ? __builtin_sqrt(square) : square <= 0 ? 0 : square;
    good = good && is_finite(square);
  }
  good = good && found.t_norm[0] > 0;
  if (finite) {
    S* s = reinterpret_cast<S*>(header.s) + m.s_offset;
    combine<S>(q, v, q, nullptr, n, r, v, ritz.block);
    combine<S>(q, s, q, nullptr, m.rows, r, s, ritz.block);
  }
  if (good) {
    new_basis(squares, found.t_norm, scale, r, ritz);
    combine<S>(ritz.ct, v_next, ritz.cv, v, n, r, v_next, ritz.block);
    orthonormalize(v_next, n, r, ritz);
  } else {
    for (int64_t c = 0; c < r * n; ++c) v_next[c] = v[c];
  }
}

template <class S>
void normalize_matrix(const Header& header, int64_t index, const Scratch& scratch) {
  const Matrix& m = reinterpret_cast<const Matrix*>(header.matrices)[index];
  const int64_t r = header.r;
  const Operator* op = operator_of(header, index);
  S* sigmas = reinterpret_cast<S*>(header.sigmas) + index;
  S* residuals = reinterpret_cast<S*>(header.residuals) + index;
  if (!takes_part<S>(header, index)) return;
  if (header.tolerance > 0) {
    const int64_t size = r * m.outer * m.inner;
    S* v = reinterpret_cast<S*>(header.v) + m.v_offset;
    const S* v_next = reinterpret_cast<const S*>(header.v_next) + m.v_offset;
    for (int64_t c = 0; c < size; ++c) v[c] = v_next[c];
  }
  const double* partial =
      reinterpret_cast<const double*>(header.gram_partial) + m.first_tile * r * r;
  const double scale = inverse_power_of_two(sigmas[0]);
  const double target = reinterpret_cast<const S*>(header.target)[index];
  Estimates found;
  if (op != nullptr) {
    double squares = 0;
    for (int64_t i = 0; i < m.n_tiles; ++i) squares += partial[4 * i] + partial[4 * i + 3];
    next_wave<S>(header, m, *op, squares, scratch, found);
  } else if (r == 1) {
    double squares = 0;
    for (int64_t i = 0; i < m.n_tiles; ++i) squares += partial[i];
    next_vector<S>(header, m, squares, found);
  } else {
    Ritz& ritz = *reinterpret_cast<Ritz*>(scratch.ritz);
    ritz.products.set_zero((int)r);
    for (int64_t i = 0; i < m.n_tiles; ++i)
      for (int64_t j = 0; j < r * r; ++j) ritz.products[j / r][j % r] += partial[i * r * r + j];
    next_vectors<S>(header, m, scale, ritz, found);
  }
  reinterpret_cast<S*>(header.raw_penalty)[index] =
      (S)raw_penalty_of(found.sigma[0], target, header.exponent, header.above != 0);
  for (int64_t j = 0; j < (op != nullptr ? 1 : r); ++j) {
    sigmas[j * header.n_matrices] = (S)found.sigma[j];
    if (header.t_partial != 0)
      residuals[j * header.n_matrices] = (S)residual_of(found.sigma[j], found.t_norm[j], scale);
  }
}

template <class T, class S = typename Simd<T>::Accumulator>
void gram_matvec_tile(const Header& header, const Tile& tile, const Tile* next,
                      const Scratch& scratch) {
  if (!takes_part<S>(header, tile.matrix)) return;
  const int64_t v = header.tolerance > 0 ? header.v_next : header.v;
  tile_products<T>(header, tile, next, reinterpret_cast<const S*>(v), scratch, [](int64_t) {});
}

}  // namespace

void gram_matvec(const Header& header, const Tile& tile, const Tile* next,
                 const Scratch& scratch) noexcept {
  with_dtype(header.weight_dtype,
             [&](auto t) { gram_matvec_tile<decltype(t)>(header, tile, next, scratch); });
}

void normalize(const Header& header, int64_t matrix, const Scratch& scratch) noexcept {
  if (header.weight_dtype == kFloat64)
    normalize_matrix<double>(header, matrix, scratch);
  else
    normalize_matrix<float>(header, matrix, scratch);
}

void elementwise_norm(const Header& header, int64_t index) noexcept {
  with_dtype(header.weight_dtype, [&](auto t) { elementwise_norm_of<decltype(t)>(header, index); });
}

}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
