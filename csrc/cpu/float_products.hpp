// Small float matrix products whose operands lie in a core's cache: what attention and the search
// for KoLeo's neighbours are made of.
//
// C [M, N] (+)= A [M, K] B [K, N]. One tile of C stays in registers over all of K; A is broadcast
// from any strides, so that a transposed operand needs no copy, and B is read in whole vectors.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dinov2_fast {

// What an instruction set gives a tile: floats of a vector, and vectors of a tile's row. Six rows
// fill the registers of each: 24 of the 32 of AVX-512 and NEON, 12 of the 16 of the others. A wider
// vector than the processor's would spill every sum at every step.
template <int lanes, int vectors> struct Registers {
  static constexpr int kLanes = lanes;
  static constexpr int kVectors = vectors;
};

using Avx512 = Registers<16, 4>;
using Avx2 = Registers<8, 2>;
#if defined(__x86_64__)
using Baseline = Registers<4, 2>;
#else
using Baseline = Registers<4, 4>;
#endif

template <int lanes> struct VectorOf {
  typedef float type [[gnu::vector_size(4 * lanes), gnu::aligned(4), gnu::may_alias]];
};

using Four = VectorOf<4>::type;

// Four rows of four columns become four columns. Written by elements, which GCC and Clang both turn
// into two shuffles a row.
[[gnu::always_inline]] inline void transpose(Four (&x)[4]) {
  const Four a{x[0][0], x[1][0], x[0][1], x[1][1]}, b{x[2][0], x[3][0], x[2][1], x[3][1]};
  const Four c{x[0][2], x[1][2], x[0][3], x[1][3]}, d{x[2][2], x[3][2], x[2][3], x[3][3]};
  x[0] = Four{a[0], a[1], b[0], b[1]};
  x[1] = Four{a[2], a[3], b[2], b[3]};
  x[2] = Four{c[0], c[1], d[0], d[1]};
  x[3] = Four{c[2], c[3], d[2], d[3]};
}

constexpr int kTileRows = 6;
// Rows beyond whole tiles take a tile of 4 or 2, so that matrices are padded to pairs of rows only.
constexpr int kRowStep = 2;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct Operand {
  const float* data;
  int64_t row_stride; // between rows of A, elements
  int64_t k_stride;   // between steps of the sum
};

template <int kRows, int kLanes, int kVectors>
[[gnu::always_inline]] inline void tile(const Operand& a, const Operand& b, float* c,
                                        int64_t c_row_stride, int64_t steps, bool accumulate) {
  using Vector = typename VectorOf<kLanes>::type;
  Vector sums[kRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
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
    for (int i = 0; i < kRows; ++i) {
      const float factor = a_at[i * a.row_stride];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j)
        sums[i][j] += factor * columns[j];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      Vector* to = reinterpret_cast<Vector*>(c + i * c_row_stride + j * kLanes);
      *to = accumulate ? *to + sums[i][j] : sums[i][j];
    }
}

// rows: a multiple of kRowStep; columns: a multiple of kLanes.
template <int kLanes, int kVectors>
[[gnu::always_inline]] inline void column_of_tiles(const Operand& a, const Operand& b, float* c,
                                                   int64_t c_row_stride, int64_t rows,
                                                   int64_t steps, bool accumulate) {
  int64_t row = 0;
  const auto next = [&](auto tile_rows) {
    constexpr int kRows = decltype(tile_rows)::value;
    tile<kRows, kLanes, kVectors>({a.data + row * a.row_stride, a.row_stride, a.k_stride}, b,
                                  c + row * c_row_stride, c_row_stride, steps, accumulate);
    row += kRows;
  };
  while (row + kTileRows <= rows)
    next(std::integral_constant<int, kTileRows>());
  if (rows - row == 4)
    next(std::integral_constant<int, 4>());
  if (rows - row == 2)
    next(std::integral_constant<int, 2>());
}

template <typename Isa>
[[gnu::always_inline]] inline void all_tiles(const Operand& a, const Operand& b, float* c,
                                             int64_t c_row_stride, int64_t rows, int64_t columns,
                                             int64_t steps, bool accumulate) {
  constexpr int kLanes = Isa::kLanes;
  constexpr int64_t kWide = Isa::kVectors * kLanes;
  int64_t column = 0;
  for (; column + kWide <= columns; column += kWide)
    column_of_tiles<kLanes, Isa::kVectors>(a, {b.data + column, 0, b.k_stride}, c + column,
                                           c_row_stride, rows, steps, accumulate);
  const Operand rest{b.data + column, 0, b.k_stride};
  const int64_t vectors = (columns - column) / kLanes;
  if constexpr (Isa::kVectors > 2) {
    if (vectors == 3)
      column_of_tiles<kLanes, 3>(a, rest, c + column, c_row_stride, rows, steps, accumulate);
    if (vectors == 2)
      column_of_tiles<kLanes, 2>(a, rest, c + column, c_row_stride, rows, steps, accumulate);
  }
  if (vectors == 1)
    column_of_tiles<kLanes, 1>(a, rest, c + column, c_row_stride, rows, steps, accumulate);
}

// Terms that are added one after the other; sums of so many are added in turn. One chain of
// thousands would lose digits that a product of matrices in a library keeps.
constexpr int64_t kStepsInARow = 320;

template <typename Isa>
[[gnu::always_inline]] inline void sum_in_turn(const Operand& a, const Operand& b, float* c,
                                               int64_t c_row_stride, int64_t rows, int64_t columns,
                                               int64_t steps, bool accumulate) {
  int64_t first = 0;
  do {
    const int64_t count = steps - first < kStepsInARow ? steps - first : kStepsInARow;
    all_tiles<Isa>({a.data + first * a.k_stride, a.row_stride, a.k_stride},
                   {b.data + first * b.k_stride, 0, b.k_stride}, c, c_row_stride, rows, columns,
                   count, accumulate || first > 0);
    first += count;
  } while (first < steps);
}

// C (+)= A B, compiled once an instruction set and not at every call.
template <typename Isa>
[[gnu::noinline]] void multiply(const Operand& a, const Operand& b, float* c, int64_t c_row_stride,
                                int64_t rows, int64_t columns, int64_t steps, bool accumulate) {
  sum_in_turn<Isa>(a, b, c, c_row_stride, rows, columns, steps, accumulate);
}

#if defined(__x86_64__)
template <>
[[gnu::noinline, gnu::target("avx2,fma")]] inline void
multiply<Avx2>(const Operand& a, const Operand& b, float* c, int64_t c_row_stride, int64_t rows,
               int64_t columns, int64_t steps, bool accumulate) {
  sum_in_turn<Avx2>(a, b, c, c_row_stride, rows, columns, steps, accumulate);
}

template <>
[[gnu::noinline, gnu::target("avx512f,avx512bw,avx512dq,avx512vl,fma")]] inline void
multiply<Avx512>(const Operand& a, const Operand& b, float* c, int64_t c_row_stride, int64_t rows,
                 int64_t columns, int64_t steps, bool accumulate) {
  sum_in_turn<Avx512>(a, b, c, c_row_stride, rows, columns, steps, accumulate);
}
#endif

} // namespace dinov2_fast
