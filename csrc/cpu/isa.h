// The kernels are compiled once per instruction-set level; this header lists the levels and the
// functions that each of them provides. The level is chosen when the module is loaded.
#pragma once

#include "../table.h"

namespace spectral {

constexpr int kMaxRows = 4;  // of a matrix that are processed together

// The kernels for the products of a tile, with r vectors per matrix.
constexpr int64_t product_rows(int64_t r) { return kMaxRows + r; }
constexpr int64_t scratch_rows(int64_t r) { return product_rows(r) + 1; }

struct CpuKernels {
  // s, partial t and partial norm of one tile; scratch as for rank_one.
  void (*gram_matvec)(const Header&, const Tile&, const Tile* next, double* scratch);
  // Partial t and partial products of one tile from a given s; scratch as for rank_one.
  void (*transposed)(const Header&, const Tile&, double* scratch);
  // Below n_tiles a part of the sums of t over the tiles of a matrix, at the address t unless that
  // is 0; then the sums of products of one matrix, at the address gram.
  void (*collect)(const Header&, int64_t index, int64_t t, int64_t gram);
  // Norm and penalty of one elementwise parameter.
  void (*elementwise_norm)(const Header&, int64_t index);
  // Adds up the partial results of one matrix: sigma, residual, penalty, v_next.
  void (*normalize)(const Header&, int64_t matrix);
  // The penalty's gradient for the rows of one tile, added to grad or written over it. scratch has
  // room for scratch_rows(r) rows of header.scratch_size elements of any type.
  void (*rank_one)(const Header&, const Tile&, bool accumulate, double* scratch);
  // The same for one elementwise parameter.
  void (*elementwise_gradient)(const Header&, int64_t index, bool accumulate);
  // An optimizer's step for the rows of one tile, then their products with v_next.
  void (*update_tile)(const Header&, const Update&, const Tile&, const Tile* next, double* scratch);
  // The same for one elementwise parameter, then its norm and penalty; beyond n_elementwise the
  // other parameters.
  void (*update_elementwise)(const Header&, const Update&, int64_t index);
};

#define SPECTRAL_DECLARE_LEVEL(level)                                                             \
  namespace level {                                                                               \
  void gram_matvec(const Header&, const Tile&, const Tile* next, double* scratch);                \
  void transposed(const Header&, const Tile&, double* scratch);                                   \
  void collect(const Header&, int64_t index, int64_t t, int64_t gram);                            \
  void elementwise_norm(const Header&, int64_t index);                                            \
  void normalize(const Header&, int64_t matrix);                                                  \
  void rank_one(const Header&, const Tile&, bool accumulate, double* scratch);                    \
  void elementwise_gradient(const Header&, int64_t index, bool accumulate);                       \
  void update_tile(const Header&, const Update&, const Tile&, const Tile* next, double* scratch); \
  void update_elementwise(const Header&, const Update&, int64_t index);                           \
  inline constexpr CpuKernels kernels{gram_matvec,          transposed,  collect,                 \
                                      elementwise_norm,     normalize,   rank_one,                \
                                      elementwise_gradient, update_tile, update_elementwise};     \
  }

SPECTRAL_DECLARE_LEVEL(baseline)
#ifdef SPECTRAL_X86_LEVELS
SPECTRAL_DECLARE_LEVEL(v3)
SPECTRAL_DECLARE_LEVEL(v4)
#endif
#undef SPECTRAL_DECLARE_LEVEL

}  // namespace spectral
