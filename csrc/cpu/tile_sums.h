// Sums over the tiles of a matrix, in their order.
#pragma once

#include "simd.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

constexpr int64_t kBlock = 16;  // columns

// to = sum over tiles of t, n columns from the given one on; returns the sum of its squares.
template <class S>
double reduce_tiles(const Header& header, const Matrix& m, int64_t first, S* to, int64_t n) {
  const Tile* tiles = reinterpret_cast<const Tile*>(header.tiles) + m.first_tile;
  const S* t = reinterpret_cast<const S*>(header.t_partial) + first;
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
    for (int j = 0; j < width; ++j) to[c + j] = sum[j];
  }
  double total = 0;
  for (int j = 0; j < kBlock; ++j) total += squares[j];
  return total;
}

}  // namespace
}  // namespace SPECTRAL_LEVEL
}  // namespace spectral
