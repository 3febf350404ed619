// Small float matrix products whose operands lie in a core's cache: what attention is made of.
//
// C [M, N] (+)= A [M, K] B [K, N]. One tile of C stays in registers over all of K; A is broadcast
// from any strides, so that a transposed operand needs no copy, and B is read in whole vectors.
#pragma once

#include <cstdint>

namespace dinov2_fast {

constexpr int kLanes = 16; // floats of a vector; narrower processors split it
using Vector [[gnu::vector_size(4 * kLanes), gnu::aligned(4), gnu::may_alias]] = float;

// Rows of a tile. Six rows by four vectors are 24 of the 32 registers of AVX-512.
constexpr int kTileRows = 6;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Columns that a matrix of n keys is stored with: whole vectors, and as many as tiles of rows need
// when the matrix is read transposed.
constexpr int64_t padded(int64_t n) { return round_up(round_up(n, kTileRows), kLanes); }

struct Operand {
  const float* data;
  int64_t row_stride; // between rows of A, elements
  int64_t k_stride;   // between steps of the sum
};

template <int kVectors>
[[gnu::always_inline]] inline void tile(const Operand& a, const Operand& b, float* c,
                                        int64_t c_row_stride, int64_t steps, bool accumulate) {
  Vector sums[kTileRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      sums[i][j] = Vector{};
  const float* a_at = a.data;
  const float* b_at = b.data;
  for (int64_t k = 0; k < steps; ++k, a_at += a.k_stride, b_at += b.k_stride) {
    Vector columns[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      columns[j] = *reinterpret_cast<const Vector*>(b_at + j * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
      const float factor = a_at[i * a.row_stride];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j)
        sums[i][j] += factor * columns[j];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      Vector* to = reinterpret_cast<Vector*>(c + i * c_row_stride + j * kLanes);
      *to = accumulate ? *to + sums[i][j] : sums[i][j];
    }
}

// rows: rounded up to whole tiles by the caller's buffers; columns: a multiple of kLanes.
template <int kVectors>
[[gnu::always_inline]] inline void column_of_tiles(const Operand& a, const Operand& b, float* c,
                                                   int64_t c_row_stride, int64_t rows,
                                                   int64_t steps, bool accumulate) {
  for (int64_t row = 0; row < rows; row += kTileRows)
    tile<kVectors>({a.data + row * a.row_stride, a.row_stride, a.k_stride}, b,
                   c + row * c_row_stride, c_row_stride, steps, accumulate);
}

[[gnu::always_inline]] inline void all_tiles(const Operand& a, const Operand& b, float* c,
                                             int64_t c_row_stride, int64_t rows, int64_t columns,
                                             int64_t steps, bool accumulate) {
  constexpr int64_t kWide = 4 * kLanes;
  int64_t column = 0;
  for (; column + kWide <= columns; column += kWide)
    column_of_tiles<4>(a, {b.data + column, 0, b.k_stride}, c + column, c_row_stride, rows, steps,
                       accumulate);
  const Operand rest{b.data + column, 0, b.k_stride};
  switch ((columns - column) / kLanes) {
  case 3:
    column_of_tiles<3>(a, rest, c + column, c_row_stride, rows, steps, accumulate);
    break;
  case 2:
    column_of_tiles<2>(a, rest, c + column, c_row_stride, rows, steps, accumulate);
    break;
  case 1:
    column_of_tiles<1>(a, rest, c + column, c_row_stride, rows, steps, accumulate);
    break;
  default:
    break;
  }
}

// Terms that are added one after the other; sums of so many are added in turn. One chain of
// thousands would lose digits that a product of matrices in a library keeps.
constexpr int64_t kStepsInARow = 320;

[[gnu::always_inline]] inline void multiply(const Operand& a, const Operand& b, float* c,
                                            int64_t c_row_stride, int64_t rows, int64_t columns,
                                            int64_t steps, bool accumulate) {
  int64_t first = 0;
  do {
    const int64_t count = steps - first < kStepsInARow ? steps - first : kStepsInARow;
    all_tiles({a.data + first * a.k_stride, a.row_stride, a.k_stride},
              {b.data + first * b.k_stride, 0, b.k_stride}, c, c_row_stride, rows, columns, count,
              accumulate || first > 0);
    first += count;
  } while (first < steps);
}

} // namespace dinov2_fast
