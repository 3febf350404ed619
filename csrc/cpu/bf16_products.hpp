// Products of small bf16 matrices with float sums, on the instructions that processors have for it.
//
// C [M, N] (+)= A [M, K] B [K, N], M and N whole tiles of 16, K of 32, padded with zeros. A lies in
// rows. B lies in panels of 16 columns; in a panel two neighbours down a column lie side by side,
// [K / 2, 16, 2], which is how both AMX tiles and AVX-512 dot products read it. The loops are
// written once over an instruction's operands. Beside the instruction itself stands its definition
// in C++, so that every loop and every layout is executed on processors without it.
#pragma once

#include "cpu/float_products.hpp"
#include "cpu/level.hpp"
#include "cpu/rows.hpp"
#include "cpu/scalar_math.hpp"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace dinov2_fast {

constexpr int64_t kTile = 16;      // rows and columns of a tile of C
constexpr int64_t kTileDepth = 32; // terms that one step over tiles adds

struct Bf16Product {
  const bfloat16* a; // [rows, a_row_stride]
  int64_t a_row_stride;
  const bfloat16* b; // [columns / 16, depth / 2, 16, 2]
  float* c;          // [rows, c_row_stride]
  int64_t c_row_stride, rows, columns, depth;
  bool accumulate;
};

// Subnormal numbers become zeros of their sign, as they do in and after both instructions.
[[gnu::always_inline]] inline float flushed(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return bit_cast<float>((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}

// One step of a sum: rounded once, to nearest even.
[[gnu::always_inline]] inline float fused_step(const bfloat16& a, const bfloat16& b, float sum) {
  return flushed(__builtin_fmaf(flushed(load(a)), flushed(load(b)), flushed(sum)));
}

// AMX: eight registers of 16 rows of 64 bytes, configured for one product and then released: a
// thread's tiles belong to whoever configured them last.
#ifdef DINOV2_FAST_AMX
struct AmxTiles {
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  [[gnu::always_inline]] AmxTiles() {
    const Configuration configuration;
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  [[gnu::always_inline]] ~AmxTiles() { asm volatile("tilerelease"); }
  AmxTiles(const AmxTiles&) = delete;

  template <int tile> [[gnu::always_inline]] void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  template <int tile> [[gnu::always_inline]] void read(const void* from, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(tile) : "memory");
  }
  template <int tile> [[gnu::always_inline]] void write(void* to, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(tile) : "memory");
  }
  template <int c, int a, int b> [[gnu::always_inline]] void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
};
#endif

// The same by its definition: even and odd terms are summed apart, added, and then added to C.
struct DefinedTiles {
  alignas(64) uint8_t tiles[8][16][64];

  template <int tile> [[gnu::always_inline]] void zero() {
    std::memset(tiles[tile], 0, sizeof(tiles[tile]));
  }
  template <int tile> [[gnu::always_inline]] void read(const void* from, int64_t row_bytes) {
    for (int row = 0; row < 16; ++row)
      std::memcpy(tiles[tile][row], static_cast<const uint8_t*>(from) + row * row_bytes, 64);
  }
  template <int tile> [[gnu::always_inline]] void write(void* to, int64_t row_bytes) {
    for (int row = 0; row < 16; ++row)
      std::memcpy(static_cast<uint8_t*>(to) + row * row_bytes, tiles[tile][row], 64);
  }
  template <int c, int a, int b> [[gnu::always_inline]] void multiply() {
    for (int row = 0; row < 16; ++row) {
      float even[16] = {}, odd[16] = {}, sums[16];
      for (int k = 0; k < 16; ++k) {
        bfloat16 factors[2], columns[32];
        std::memcpy(factors, tiles[a][row] + 4 * k, sizeof(factors));
        std::memcpy(columns, tiles[b][k], sizeof(columns));
#pragma omp simd
        for (int n = 0; n < 16; ++n) {
          even[n] = fused_step(factors[0], columns[2 * n], even[n]);
          odd[n] = fused_step(factors[1], columns[2 * n + 1], odd[n]);
        }
      }
      std::memcpy(sums, tiles[c][row], sizeof(sums));
#pragma omp simd
      for (int n = 0; n < 16; ++n)
        sums[n] = flushed(flushed(sums[n]) + flushed(even[n] + odd[n]));
      std::memcpy(tiles[c][row], sums, sizeof(sums));
    }
  }
};

// Two by two tiles of C stay in registers over all of the depth: each tile that is read serves two
// products.
template <typename Tiles> class TileProducts {
public:
  [[gnu::always_inline]] inline void multiply(const Bf16Product& p) {
    int64_t row = 0;
    for (; row + 2 * kTile <= p.rows; row += 2 * kTile)
      row_of_tiles<2>(p, row);
    if (row < p.rows)
      row_of_tiles<1>(p, row);
  }

private:
  template <int kRows>
  [[gnu::always_inline]] inline void row_of_tiles(const Bf16Product& p, int64_t row) {
    int64_t column = 0;
    for (; column + 2 * kTile <= p.columns; column += 2 * kTile)
      block<kRows, 2>(p, row, column);
    if (column < p.columns)
      block<kRows, 1>(p, row, column);
  }

  // Registers 0 to 3 are C, 4 and 5 A, 6 and 7 B.
  template <int kRows, int kColumns>
  [[gnu::always_inline]] inline void block(const Bf16Product& p, int64_t row, int64_t column) {
    const int64_t a_bytes = p.a_row_stride * int64_t{sizeof(bfloat16)};
    const int64_t c_bytes = p.c_row_stride * int64_t{sizeof(float)};
    const bfloat16* a = p.a + row * p.a_row_stride;
    const bfloat16* a_below = a + kTile * p.a_row_stride;
    const bfloat16* b = p.b + column * p.depth;
    const bfloat16* b_beside = b + kTile * p.depth;
    float* c = p.c + row * p.c_row_stride + column;
    float* c_below = c + kTile * p.c_row_stride;
    begin<0>(c, c_bytes, p.accumulate);
    if constexpr (kColumns == 2)
      begin<1>(c + kTile, c_bytes, p.accumulate);
    if constexpr (kRows == 2)
      begin<2>(c_below, c_bytes, p.accumulate);
    if constexpr (kRows == 2 && kColumns == 2)
      begin<3>(c_below + kTile, c_bytes, p.accumulate);
    for (int64_t k = 0; k < p.depth; k += kTileDepth) {
      tiles_.template read<4>(a + k, a_bytes);
      tiles_.template read<6>(b + k * kTile, 4 * kTile);
      tiles_.template multiply<0, 4, 6>();
      if constexpr (kColumns == 2) {
        tiles_.template read<7>(b_beside + k * kTile, 4 * kTile);
        tiles_.template multiply<1, 4, 7>();
      }
      if constexpr (kRows == 2) {
        tiles_.template read<5>(a_below + k, a_bytes);
        tiles_.template multiply<2, 5, 6>();
      }
      if constexpr (kRows == 2 && kColumns == 2)
        tiles_.template multiply<3, 5, 7>();
    }
    tiles_.template write<0>(c, c_bytes);
    if constexpr (kColumns == 2)
      tiles_.template write<1>(c + kTile, c_bytes);
    if constexpr (kRows == 2)
      tiles_.template write<2>(c_below, c_bytes);
    if constexpr (kRows == 2 && kColumns == 2)
      tiles_.template write<3>(c_below + kTile, c_bytes);
  }

  template <int tile>
  [[gnu::always_inline]] inline void begin(const float* c, int64_t row_bytes, bool accumulate) {
    if (accumulate)
      tiles_.template read<tile>(c, row_bytes);
    else
      tiles_.template zero<tile>();
  }

  Tiles tiles_;
};

using Floats16 = VectorOf<16>::type;
typedef int32_t Pairs16 [[gnu::vector_size(64), gnu::aligned(4), gnu::may_alias]];

// AVX-512: sums[i] += a[2i] b[2i] + a[2i + 1] b[2i + 1] for 16 sums.
#ifdef DINOV2_FAST_AVX512_BF16
struct Avx512Dot {
  [[gnu::always_inline]] static void add(Floats16& sums, const Pairs16& a, const Pairs16& b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
  }
};
#endif

// The same by its definition: the odd term of a pair is added first.
struct DefinedDot {
  [[gnu::always_inline]] static void add(Floats16& sums, const Pairs16& a, const Pairs16& b) {
    float total[16];
    bfloat16 left[32], right[32];
    std::memcpy(total, &sums, sizeof(total));
    std::memcpy(left, &a, sizeof(left));
    std::memcpy(right, &b, sizeof(right));
#pragma omp simd
    for (int n = 0; n < 16; ++n)
      total[n] = fused_step(left[2 * n], right[2 * n],
                            fused_step(left[2 * n + 1], right[2 * n + 1], total[n]));
    std::memcpy(&sums, total, sizeof(total));
  }
};

// Four rows by four panels: 16 sums, four panels of B and a factor of A in 21 of 32 registers, and
// enough sums to hide the instruction's latency.
template <typename Dot> class VectorProducts {
public:
  [[gnu::always_inline]] inline void multiply(const Bf16Product& p) {
    int64_t column = 0;
    for (; column + 4 * kTile <= p.columns; column += 4 * kTile)
      column_of_blocks<4>(p, column);
    const int64_t panels = (p.columns - column) / kTile;
    if (panels == 3)
      column_of_blocks<3>(p, column);
    if (panels == 2)
      column_of_blocks<2>(p, column);
    if (panels == 1)
      column_of_blocks<1>(p, column);
  }

private:
  static constexpr int kRows = 4;

  template <int kPanels>
  [[gnu::always_inline]] static inline void column_of_blocks(const Bf16Product& p, int64_t column) {
    for (int64_t row = 0; row < p.rows; row += kRows)
      block<kPanels>(p.a + row * p.a_row_stride, p.a_row_stride, p.b + column * p.depth, p.depth,
                     p.c + row * p.c_row_stride + column, p.c_row_stride, p.accumulate);
  }

  template <int kPanels>
  [[gnu::always_inline]] static inline void block(const bfloat16* a, int64_t a_row_stride,
                                                  const bfloat16* b, int64_t depth, float* c,
                                                  int64_t c_row_stride, bool accumulate) {
    Floats16 sums[kRows][kPanels];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kPanels; ++j)
        sums[i][j] = accumulate
                         ? *reinterpret_cast<const Floats16*>(c + i * c_row_stride + j * kTile)
                         : Floats16{};
    for (int64_t k = 0; k < depth; k += 2) {
      Pairs16 columns[kPanels];
#pragma GCC unroll 4
      for (int j = 0; j < kPanels; ++j)
        columns[j] = *reinterpret_cast<const Pairs16*>(b + j * kTile * depth + k * kTile);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        int32_t pair;
        std::memcpy(&pair, a + i * a_row_stride + k, sizeof(pair));
        const Pairs16 factor = pair - Pairs16{};
#pragma GCC unroll 4
        for (int j = 0; j < kPanels; ++j)
          Dot::add(sums[i][j], factor, columns[j]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kPanels; ++j)
        *reinterpret_cast<Floats16*>(c + i * c_row_stride + j * kTile) = sums[i][j];
  }
};

// What multiplies bf16 matrices; the last two are the definitions of the others in C++.
enum class Products { none, avx512_bf16, amx, defined_avx512_bf16, defined_amx };

template <typename Product> struct Multiply {
  [[gnu::always_inline]] static inline void run(const Bf16Product& p, int64_t, int64_t, int64_t) {
    Product product;
    product.multiply(p);
  }
};

#ifdef DINOV2_FAST_AVX512_BF16
[[gnu::target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]] inline void
multiply_avx512_bf16(const Bf16Product& p, int64_t, int64_t, int64_t) {
  Multiply<VectorProducts<Avx512Dot>>::run(p, 0, 0, 0);
}
#endif
#ifdef DINOV2_FAST_AMX
[[gnu::target("amx-tile,amx-bf16")]] inline void multiply_amx(const Bf16Product& p, int64_t,
                                                              int64_t, int64_t) {
  Multiply<TileProducts<AmxTiles>>::run(p, 0, 0, 0);
}
#endif

using MultiplyFunction = void (*)(const Bf16Product&, int64_t, int64_t, int64_t);

// The function that computes a product on what was chosen; null for none.
inline MultiplyFunction multiply_on(Products products) {
  const Level widest = contains(available_levels(), Level::avx2) ? Level::avx2 : Level::baseline;
  switch (products) {
#ifdef DINOV2_FAST_AVX512_BF16
  case Products::avx512_bf16:
    return multiply_avx512_bf16;
#endif
#ifdef DINOV2_FAST_AMX
  case Products::amx:
    return multiply_amx;
#endif
  case Products::defined_avx512_bf16:
    return at_level<Multiply<VectorProducts<DefinedDot>>, Bf16Product>(widest);
  case Products::defined_amx:
    return at_level<Multiply<TileProducts<DefinedTiles>>, Bf16Product>(widest);
  default:
    return nullptr;
  }
}

// Whether what `multiply` makes of whole and ragged blocks of tiles, added to ones, is the product
// by plain loops. Every term and every sum is an integer below 2^24: any order of summing is exact.
template <typename Run> bool products_agree(const Run& multiply) {
  constexpr int64_t kRows = 48, kColumns = 112, kDepth = 64;
  alignas(64) bfloat16 a[kRows * kDepth], b[kDepth * kColumns];
  alignas(64) float c[kRows * kColumns];
  for (int64_t i = 0; i < kRows * kDepth; ++i)
    store(a[i], static_cast<float>(i * 37 % 101 - 50));
  for (int64_t i = 0; i < kDepth * kColumns; ++i)
    store(b[i], static_cast<float>(i * 53 % 103 - 51));
  for (float& sum : c)
    sum = 1.0f;
  multiply(Bf16Product{a, kDepth, b, c, kColumns, kRows, kColumns, kDepth, true});
  for (int64_t row = 0; row < kRows; ++row)
    for (int64_t column = 0; column < kColumns; ++column) {
      const bfloat16* panel = b + column / kTile * kTile * kDepth + column % kTile * 2;
      float sum = 1.0f;
      for (int64_t k = 0; k < kDepth; ++k)
        sum += load(a[row * kDepth + k]) * load(panel[k / 2 * 2 * kTile + k % 2]);
      if (c[row * kColumns + column] != sum)
        return false;
    }
  return true;
}

} // namespace dinov2_fast
