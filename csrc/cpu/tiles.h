// Rows of a tile (pairs of SIMD vectors, prefetching, pieces); sums over the tiles of a matrix.
#pragma once

#include "isa.h"
#include "simd.h"

namespace spectral {
namespace SPECTRAL_LEVEL {
namespace {

constexpr int kLine = 64;  // bytes

// Calls body(c, prefetch) for every full pair of vectors below n, and returns where it stopped;
// prefetch is true once per cache line.
template <class T, class Body>
SPECTRAL_INLINE int64_t for_pairs(int64_t n, Body body) {
  constexpr int kPair = 2 * Simd<T>::kLanes, kBytes = kPair * (int)sizeof(T);
  int64_t c = 0;
  if (kBytes < kLine)
    for (; c + kLine / (int)sizeof(T) <= n; c += kLine / (int)sizeof(T)) {
      body(c, true);
      for (int i = kPair; i < kLine / (int)sizeof(T); i += kPair) body(c + i, false);
    }
  for (; c + kPair <= n; c += kPair) body(c, kBytes >= kLine);
  return c;
}

// Fetches the lines of one pair of vectors at p.
template <class T>
SPECTRAL_INLINE void prefetch_pair(const T* p) {
  constexpr int kBytes = 2 * Simd<T>::kLanes * (int)sizeof(T);
  for (int i = 0; i < kBytes; i += kLine) __builtin_prefetch((const char*)p + i, 0, 3);
}

// A matrix whose rows lie in pieces (outer > 1) is gathered a row block at a time.
template <class T>
const T* gather_row(const Matrix& m, int64_t row, T* scratch) {
  const T* source = reinterpret_cast<const T*>(m.weight) + row * m.row_stride;
  for (int64_t a = 0; a < m.outer; ++a)
    __builtin_memcpy(scratch + a * m.inner, source + a * m.outer_stride, m.inner * sizeof(T));
  return scratch;
}

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
