// The tables that Python writes and the kernels read, byte for byte.
//
// Every field is eight bytes wide, so that no compiler inserts padding; an address is an int64.
// spectral_kernels/tables/schema.py has the same fields: the two are compared when the module is
// loaded.
#pragma once

#include <stdint.h>

namespace spectral {

enum DType : int64_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// One matrix [rows, outer * inner]: element (r, a * inner + b) lies at r * row_stride +
// a * outer_stride + b (strides in elements). A plain matrix has outer = 1.
struct Matrix {
  int64_t weight;  // address of element (0, 0)
  int64_t grad;    // the same for the gradient; 0: there is none, skip the matrix
  int64_t grad_dtype;
  int64_t rows, outer, inner;
  int64_t row_stride, outer_stride;
  int64_t grad_row_stride, grad_outer_stride;
  int64_t v_offset;  // first element in v and v_next, r times outer * inner of them
  int64_t s_offset;  // first element in s, r times rows of them
  int64_t first_tile, n_tiles;
  int64_t reach;  // a step along d sigma / dW of this size changes sigma by one at most: 1, and of
                  // an operator the taps of a phase
};

// A block of rows of one matrix, the unit of work.
struct Tile {
  int64_t matrix;
  int64_t row_begin, row_end;
  int64_t t_offset;  // first element of this tile's partial t in t_partial, r times N of them
};

// kChunkColumns columns of one matrix (fewer at its end), the unit of work of the stage that sums t
// over the tiles on a GPU. Where a matrix has one vector; without columns it has one chunk.
struct Chunk {
  int64_t matrix;
  int64_t begin;  // first column
};

constexpr int kChunkColumns = 128;

// A convolution taken as an operator: the columns of its kernel, which is the matrix, are channels
// and taps. Strides are in columns. See spectral_kernels/backends/operators.py for the mathematics.
struct Operator {
  int64_t channels, channel_stride;
  int64_t first_tap, n_taps;  // in the list of taps, those of a phase one after the other
  int64_t count[3];           // taps of a phase along each dimension, at most; 1: no frequency
};

// A tap of the kernel of an operator.
struct Tap {
  int64_t column;     // that of the first channel
  int64_t is_last;    // of its phase
  int64_t number[3];  // which tap of its phase it is along each dimension
  int64_t next[3];    // columns from it to the next one of the phase along it; 0: there is none
};

enum ElementwiseKind : int64_t { kShift = 0, kGain = 1, kRows = 2 };

// A bias or a norm's shift, whose Euclidean norm is pulled to a target; a norm's gain, each element
// of which is; or rows, one after the other, the norm of each of which is.
struct Elementwise {
  int64_t weight;
  int64_t grad;
  int64_t grad_dtype;
  int64_t size;
  int64_t kind;
  int64_t length;   // elements of a row
  int64_t targets;  // one number for a shift, one per element of a gain, one per row, in the
                    // state's type; 0: a shift is pulled to 0, a gain to 1 (rows have targets)
};

enum Rule : int64_t { kAdamW = 0, kSgd = 1 };

// What a step does with sigma instead of the penalty's pull: nothing else, W <- W - max(sigma -
// tau, 0) u v^T, or W <- (tau / sigma) W.
enum Constraint : int64_t { kFree = 0, kCap = 1, kSphere = 2 };

// The optimizer's state of one matrix, one elementwise parameter or (a part of) another parameter.
struct Moment {
  int64_t first;   // address that goes with the first element: exp_avg or momentum_buffer; 0: none
  int64_t second;  // the same for exp_avg_sq
  int64_t parameter;  // which parameter, for its number of steps
  int64_t group;      // which row of groups; negative: the parameter is left as it is
};

// The hyperparameters of a group of parameters, as in torch.optim.
struct Group {
  double lr, weight_decay;
  double option_1, option_2;  // betas; momentum and dampening
  double eps, nesterov;
};

// What an optimizer's step needs in addition to a Header, whose gradients are those of the task.
// Addresses are on the device of the weights.
struct Update {
  int64_t rule;
  int64_t moment_dtype;    // that of the weights, or float32
  int64_t matrix_moments;  // in the order of the matrices
  int64_t elementwise_moments;
  int64_t others, n_others;  // parameters without a penalty, in parts, as Elementwise
  int64_t other_moments;
  int64_t groups;
  int64_t steps;       // float32 per parameter, this step included
  int64_t decoupled;   // the penalty acts on the weights, beside weight decay
  int64_t grad_scale;  // one float32 number by which gradients are multiplied; 0: there is none
  int64_t found_inf;   // one float32 number: above zero nothing changes; 0: there is none
  int64_t constraint;  // Constraint: takes the place of the penalty, and then decoupled is 1
};

constexpr int kMaxVectors = 16;  // per matrix

// Everything one call needs. State arrays are float32, or float64 for float64 weights. A matrix has
// r vectors, one after the other; sigmas and residuals have a row per vector, the largest first.
struct Header {
  int64_t weight_dtype;
  int64_t matrices, n_matrices;
  int64_t tiles, n_tiles;
  int64_t elementwise, n_elementwise;
  int64_t t_partial;     // per tile [r, N]; 0: only s is wanted
  int64_t gram_partial;  // per tile [r, r], float64: products of the rows' numbers in s, summed
  int64_t v;             // [sum of r N] the vectors that the products are taken with
  int64_t v_next;        // [sum of r N] normalize writes the next ones here
  int64_t s;             // [sum of r M] W v
  int64_t sigmas;        // [r, n_matrices]
  int64_t residuals;     // [r, n_matrices]
  int64_t norm;          // [n_elementwise] Euclidean norm; of rows the largest
  int64_t raw_penalty;   // [n_matrices + n_elementwise] without strength
  int64_t strength;      // [n_matrices + n_elementwise]
  int64_t target;        // [n_matrices]
  int64_t scale;         // one number that multiplies every strength; 0: there is none
  double exponent;
  int64_t scratch_size;  // elements of the longest row
  int64_t n_bytes;       // size of the weights, to decide whether threads pay
  int64_t r;             // vectors per matrix: 1, 2, 4, 8 or 16
  // 0: all matrices take part. Above: those whose first residual exceeds tolerance * its sigma,
  // with the products taken with v_next, which normalize copies to v; the others stay as they are.
  double tolerance;
  int64_t chunks, n_chunks;  // those of a matrix one after the other
  int64_t chunk_squares;     // per chunk, float64: squares of its sums of t, summed
  int64_t arrivals;  // per matrix, int32: programs that are done with a chunk of it; 0 again
                     // when the last one has finished the matrix
  // Per matrix, if all of them are operators; 0: they are matrices. r is then 2, for the real and
  // the imaginary part of one vector, and only the first row of sigmas and residuals is used.
  int64_t operators;
  int64_t taps;
  int64_t most_taps;  // of an operator
  int64_t above;      // 1: what is at or below its target has neither penalty nor gradient
};

}  // namespace spectral
