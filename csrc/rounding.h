// Thresholds for rounding errors when several vectors of a matrix are orthonormalized, the same on
// all processors.
#pragma once

namespace spectral {

constexpr double kZero = 1e-12;           // of the largest eigenvalue: a smaller one is rounding
constexpr double kMaxAmplified = 1e5;     // of the rounding errors of a sum of vectors
constexpr double kSmallestPivot = 1e-10;  // of a unit vector's square, beside those before it

}  // namespace spectral
