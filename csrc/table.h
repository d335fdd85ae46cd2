// The tables that spectral_kernels/plan.py writes and the kernels read, byte for byte.
//
// Every field is eight bytes wide, so that no compiler inserts padding; an address is an int64.
// The sizes are checked against plan.py when the module is loaded.
#pragma once

#include <stdint.h>

namespace spectral {

enum DType : int64_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// One matrix [rows, outer * inner]: element (r, a * inner + b) lies at r * row_stride +
// a * outer_stride + b (strides in elements). A plain matrix has outer = 1.
struct Matrix {
  int64_t weight;  // address of element (0, 0)
  int64_t grad;    // the same of the gradient; 0: there is none, skip the matrix
  int64_t grad_dtype;
  int64_t rows, outer, inner;
  int64_t row_stride, outer_stride;
  int64_t grad_row_stride, grad_outer_stride;
  int64_t v_offset;  // first element in v and v_next, outer * inner of them
  int64_t s_offset;  // first element in s, rows of them
  int64_t first_tile, n_tiles;
};

// A block of rows of one matrix, the unit of work.
struct Tile {
  int64_t matrix;
  int64_t row_begin, row_end;
  int64_t t_offset;  // first element of this tile's partial t in t_partial
};

enum VectorKind : int64_t { kShift = 0, kGain = 1 };

// A bias, a norm's shift (both pulled to 0) or a norm's gain (each element pulled to 1).
struct Vector {
  int64_t weight;
  int64_t grad;
  int64_t grad_dtype;
  int64_t size;
  int64_t kind;
};

// Everything one call needs. State arrays are float32, or float64 for float64 weights.
struct Header {
  int64_t weight_dtype;
  int64_t matrices, n_matrices;
  int64_t tiles, n_tiles;
  int64_t vectors, n_vectors;
  int64_t t_partial;     // per tile [N]; 0: only s is wanted
  int64_t norm_partial;  // per tile, float64: sum of s_r^2
  int64_t v;             // [sum of N] the vectors that the products are taken with
  int64_t v_next;        // [sum of N] normalize writes the next ones here
  int64_t s;             // [sum of M] W v
  int64_t sigma;         // [n_matrices]
  int64_t residual;      // [n_matrices]
  int64_t norm;          // [n_vectors] Euclidean norm
  int64_t penalty;       // [n_matrices + n_vectors] without strength
  int64_t strength;      // [n_matrices + n_vectors]
  int64_t target;        // [n_matrices]
  int64_t scale;         // one number that multiplies every strength; 0: there is none
  double exponent;
  int64_t scratch_size;  // elements of the longest row
  int64_t n_bytes;       // size of the weights, to decide whether threads pay
};

}  // namespace spectral
