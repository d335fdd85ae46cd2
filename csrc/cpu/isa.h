// The kernels are compiled once per instruction-set level; this header lists the levels and the
// functions that each of them provides. The level is chosen when the module is loaded.
#pragma once

#include "../table.h"

namespace spectral {

constexpr int kMaxRows = 4;  // of a matrix that are processed together

constexpr int64_t kRitzBytes = 52 * 1024;

// Whether vectors that go with numbers of a type are brought into split order (simd.h).
constexpr bool splits(int64_t dtype) { return dtype == kBFloat16; }

struct Complex {
  double re, im;
};

// Memory of one thread for intermediate results; scratch.h allocates what the matrices of a call
// need, and the rest is null.
struct Scratch {
  void* rows;         // kMaxRows rows of a matrix that is not one piece per row (outer > 1)
  float* v;           // [r, N] what split weights are multiplied by, in split order
  float* gradient_v;  // [terms, N] what is added to split gradients, in split order
  void* ritz;         // kRitzBytes for several vectors; for operators a Complex per tap
};

// They run on the threads of a parallel region, which an exception must not leave, and with a stack
// of 16 KB, which is what OMP_STACKSIZE may ask for.
struct CpuKernels {
  // s, partial t and partial norm of one tile.
  void (*gram_matvec)(const Header&, const Tile&, const Tile* next, const Scratch&) noexcept;
  // Partial t and partial products of one tile from a given s.
  void (*transposed)(const Header&, const Tile&, const Scratch&) noexcept;
  // Below n_tiles a part of the sums of t over the tiles of a matrix, at the address t unless that
  // is 0; then the sums of products of one matrix, at the address gram.
  void (*collect)(const Header&, int64_t index, int64_t t, int64_t gram) noexcept;
  // Norm and penalty of one elementwise parameter.
  void (*elementwise_norm)(const Header&, int64_t index) noexcept;
  // Adds up the partial results of one matrix: sigma, residual, penalty, v_next.
  void (*normalize)(const Header&, int64_t matrix, const Scratch&) noexcept;
  // The penalty's gradient for the rows of one tile, added to grad or written over it.
  void (*rank_one)(const Header&, const Tile&, bool accumulate, const Scratch&) noexcept;
  // The same for one elementwise parameter.
  void (*elementwise_gradient)(const Header&, int64_t index, bool accumulate) noexcept;
  // An optimizer's step for the rows of one tile, then their products with v_next.
  void (*update_tile)(const Header&, const Update&, const Tile&, const Tile* next,
                      const Scratch&) noexcept;
  // The same for one elementwise parameter, then its norm and penalty; beyond n_elementwise the
  // other parameters.
  void (*update_elementwise)(const Header&, const Update&, int64_t index) noexcept;
};

#define SPECTRAL_DECLARE_LEVEL(level)                                                         \
  namespace level {                                                                           \
  void gram_matvec(const Header&, const Tile&, const Tile* next, const Scratch&) noexcept;    \
  void transposed(const Header&, const Tile&, const Scratch&) noexcept;                       \
  void collect(const Header&, int64_t index, int64_t t, int64_t gram) noexcept;               \
  void elementwise_norm(const Header&, int64_t index) noexcept;                               \
  void normalize(const Header&, int64_t matrix, const Scratch&) noexcept;                     \
  void rank_one(const Header&, const Tile&, bool accumulate, const Scratch&) noexcept;        \
  void elementwise_gradient(const Header&, int64_t index, bool accumulate) noexcept;          \
  void update_tile(const Header&, const Update&, const Tile&, const Tile* next,               \
                   const Scratch&) noexcept;                                                  \
  void update_elementwise(const Header&, const Update&, int64_t index) noexcept;              \
  inline constexpr CpuKernels kernels{gram_matvec,          transposed,  collect,             \
                                      elementwise_norm,     normalize,   rank_one,            \
                                      elementwise_gradient, update_tile, update_elementwise}; \
  }

SPECTRAL_DECLARE_LEVEL(baseline)
#ifdef SPECTRAL_X86_LEVELS
SPECTRAL_DECLARE_LEVEL(v3)
SPECTRAL_DECLARE_LEVEL(v4)
#endif
#undef SPECTRAL_DECLARE_LEVEL

}  // namespace spectral
