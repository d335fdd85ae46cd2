// s = W v and t = W^T s of every tile, and the stage that adds up the tiles.

#include "isa.h"
#include "tile_products.h"
#include "vector_norm.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

// v_next = sum over tiles of t; returns the sum of its squares.
template <class S>
double reduce_tiles(const Header& header, const Matrix& m, S* v_next, int64_t n) {
  constexpr int kBlock = 16;
  const Tile* tiles = reinterpret_cast<const Tile*>(header.tiles) + m.first_tile;
  const S* t = reinterpret_cast<const S*>(header.t_partial);
  double squares[kBlock] = {};
  for (int64_t c = 0; c < n; c += kBlock) {
    const int width = n - c < kBlock ? (int)(n - c) : kBlock;
    S sum[kBlock] = {};
    for (int64_t i = 0; i < m.n_tiles; ++i) {
      const S* part = t + tiles[i].t_offset + c;
      if (width == kBlock)
        for (int j = 0; j < kBlock; ++j) sum[j] += part[j];
      else
        for (int j = 0; j < width; ++j) sum[j] += part[j];
    }
    for (int j = 0; j < kBlock; ++j) squares[j] += (double)sum[j] * (double)sum[j];
    for (int j = 0; j < width; ++j) v_next[c + j] = sum[j];
  }
  double total = 0;
  for (int j = 0; j < kBlock; ++j) total += squares[j];
  return total;
}

template <class S>
void normalize_matrix(const Header& header, int64_t index) {
  const Matrix& m = reinterpret_cast<const Matrix*>(header.matrices)[index];
  const int64_t n = m.outer * m.inner;
  S* sigmas = reinterpret_cast<S*>(header.sigma);
  double squares = 0;
  for (int64_t i = 0; i < m.n_tiles; ++i)
    squares += reinterpret_cast<const double*>(header.norm_partial)[m.first_tile + i];
  const double sigma = __builtin_sqrt(squares);
  const double scale = inverse_power_of_two(sigmas[index]);
  const double target = reinterpret_cast<const S*>(header.target)[index];
  const double excess = power(sigma, header.exponent) - power(target, header.exponent);
  sigmas[index] = (S)sigma;
  reinterpret_cast<S*>(header.penalty)[index] = (S)(excess * excess);
  if (header.t_partial == 0) return;

  const S* v = reinterpret_cast<const S*>(header.v) + m.v_offset;
  S* v_next = reinterpret_cast<S*>(header.v_next) + m.v_offset;
  const double t_norm = __builtin_sqrt(reduce_tiles(header, m, v_next, n));
  const bool good = is_finite(t_norm) && t_norm > 0 && is_finite(sigma);
  const double inverse = 1 / t_norm;
  for (int64_t c = 0; c < n; ++c) v_next[c] = good ? (S)(v_next[c] * inverse) : v[c];
  // ||W^T u - sigma v||^2 = ||W^T u||^2 - sigma^2
  double residual = sigma;
  if (is_finite(sigma) && sigma > 0) {
    const double wtu = t_norm / (scale * sigma);
    const double squared = (wtu - sigma) * (wtu + sigma);
    residual = squared > 0 ? __builtin_sqrt(squared) : squared <= 0 ? 0 : squared;
  }
  reinterpret_cast<S*>(header.residual)[index] = (S)residual;
}

template <class T, class S = typename Simd<T>::Accumulator>
void gram_matvec_tile(const Header& header, const Tile& tile, const Tile* next, double* scratch) {
  tile_products<T>(header, tile, next, reinterpret_cast<const S*>(header.v), scratch,
                   [](int64_t) {});
}

}  // namespace

void gram_matvec(const Header& header, const Tile& tile, const Tile* next, double* scratch) {
  with_dtype(header.weight_dtype,
             [&](auto t) { gram_matvec_tile<decltype(t)>(header, tile, next, scratch); });
}

void normalize(const Header& header, int64_t matrix) {
  if (header.weight_dtype == kFloat64)
    normalize_matrix<double>(header, matrix);
  else
    normalize_matrix<float>(header, matrix);
}

void vector_norm(const Header& header, int64_t vector) {
  with_dtype(header.weight_dtype, [&](auto t) { vector_norm_of<decltype(t)>(header, vector); });
}

}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
