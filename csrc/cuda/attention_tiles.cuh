// What the attention kernels share: arguments, the place of a CTA, tiles of rows, and products of a
// warp's 32 rows with 16 rows of a tile.
//
// "Rows" are what a warp owns (queries, or keys in the backward pass of keys); "columns" are the
// rows of the other kind, which pass by in tiles of 64 and steps of 16.
#pragma once

#include "cuda/device/mma.cuh"
#include "cuda/device/vector.cuh"

namespace dinov2_fast {
namespace {

constexpr int kHeadDim = kTileColumns;
constexpr int kWarpRows = 32;   // two products of 16 rows share each fragment of columns
constexpr int kColumns = 64;    // of a tile that passes by
constexpr int kStep = kMmaRows; // columns of one step
constexpr int kSteps = kColumns / kStep;
constexpr int kTileBytes = kColumns * kRowBytes;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct Heads {
  void* data; // [T, H, 64], each row of 64 contiguous and at a multiple of 16 bytes
  int64_t row_stride;
  int64_t head_stride;
};

struct Params {
  Heads q, k, v, out, d_out, d_q, d_k, d_v; // gradients in the backward pass only
  float* lse;                               // [H, Tq]
  float* delta;                             // [H, Tq], backward: sums of d_out * out
  float* d_q_sums;                          // [Tq, H, 64], where dQ is summed in any order
  const int* query_offsets;                 // [S + 1]
  const int* key_offsets;                   // [S + 1]
  int64_t num_queries;                      // Tq
  float scale;
  float scale_log2; // scale * log2(e): softmax runs on exp2
  int first_sequence;
  int num_blocks; // of rows in the longest sequence of the launch
  int num_heads;
  unsigned num_problems; // sequences and heads of the launch, where CTAs compute several
};

// What a CTA works on. Heads vary fastest: neighbouring CTAs read the same pages.
struct Place {
  int head, block;
  int64_t first_query, first_key; // of the sequence
  int queries, keys;              // of the sequence
};

__device__ inline Place place_of(const Params& p, unsigned number = blockIdx.x) {
  const unsigned heads = static_cast<unsigned>(p.num_heads);
  const unsigned blocks = static_cast<unsigned>(p.num_blocks), rest = number / heads;
  const int64_t sequence = static_cast<int64_t>(p.first_sequence) + rest / blocks;
  const int query = p.query_offsets[sequence], key = p.key_offsets[sequence];
  return {static_cast<int>(number % heads),      static_cast<int>(rest % blocks),  query, key,
          p.query_offsets[sequence + 1] - query, p.key_offsets[sequence + 1] - key};
}

// body(0), body(1), ... with numbers that are types: constants to the compiler.
template <int kEnd, int kBegin = 0, typename Body> __device__ inline void unroll(const Body& body) {
  if constexpr (kBegin < kEnd) {
    body(std::integral_constant<int, kBegin>{});
    unroll<kEnd, kBegin + 1>(body);
  }
}

template <typename T>
__device__ inline T* rows_of(const Heads& heads, int64_t first, const Place& place) {
  return static_cast<T*>(heads.data) + first * heads.row_stride + place.head * heads.head_stride;
}

// Starts copying rows into a tile. Zeros fill what is missing up to a whole step, or a whole warp's
// rows: what does not exist must not turn products into NaN. Beyond that nothing is ever read.
template <typename T, int kRows, int kThreads, int kWhole>
__device__ inline void copy_rows(uint32_t tile, const T* from, int64_t row_stride, int count) {
  constexpr int kRowsAtOnce = kThreads / kRowChunks;
  static_assert(kRows % kRowsAtOnce == 0, "threads take whole rows");
  const int chunk = threadIdx.x % kRowChunks, first = threadIdx.x / kRowChunks;
  const int end = (count + kWhole - 1) / kWhole * kWhole;
  from += first * row_stride + chunk * (kHeadDim / kRowChunks);
#pragma unroll 4 // of at most 8: the addresses of all would not fit in registers with sums
  for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
    const int row = first + i * kRowsAtOnce;
    if (row < end)
      copy_chunk_async(tile + chunk_offset(row, chunk), from, row < count);
    from += kRowsAtOnce * row_stride;
  }
}

// The same of rows that all exist, with constant distances in the tile.
template <typename T, int kRows, int kThreads>
__device__ inline void copy_full_rows(uint32_t tile, const T* from, int64_t row_stride) {
  constexpr int kRowsAtOnce = kThreads / kRowChunks;
  static_assert(kRowsAtOnce % kRowChunks == 0, "chunks of a thread's rows are exchanged alike");
  const int chunk = threadIdx.x % kRowChunks, first = threadIdx.x / kRowChunks;
  tile += chunk_offset(first, chunk);
  from += first * row_stride + chunk * (kHeadDim / kRowChunks);
  unroll<kRows / kRowsAtOnce>([&](auto i) {
    copy_chunk_async<i * kRowsAtOnce * kRowBytes>(tile, from);
    from += kRowsAtOnce * row_stride;
  });
}

// A tile of columns of two tensors, one after the other; tiles take turns in two places.
template <typename T> struct Columns {
  const T *a, *b; // the sequence's first row
  int64_t a_row_stride, b_row_stride;
  int count; // of the sequence
  uint32_t places;

  __device__ uint32_t place(int tile) const { return places + tile % 2 * 2 * kTileBytes; }
  __device__ int count_of(int tile) const { return min(kColumns, count - tile * kColumns); }
  // At least one, if empty: what else is copied must arrive where there are no columns, too.
  __device__ int num_tiles() const { return max(1, (count + kColumns - 1) / kColumns); }

  template <int kThreads, int kWhole = kStep> __device__ void copy(int tile) const {
    const int64_t begin = static_cast<int64_t>(tile) * kColumns;
    copy_rows<T, kColumns, kThreads, kWhole>(place(tile), a + begin * a_row_stride, a_row_stride,
                                             count_of(tile));
    copy_rows<T, kColumns, kThreads, kWhole>(place(tile) + kTileBytes, b + begin * b_row_stride,
                                             b_row_stride, count_of(tile));
  }

  // A tile of which all columns exist.
  template <int kThreads> __device__ void copy_full(int tile) const {
    const int64_t begin = static_cast<int64_t>(tile) * kColumns;
    copy_full_rows<T, kColumns, kThreads>(place(tile), a + begin * a_row_stride, a_row_stride);
    copy_full_rows<T, kColumns, kThreads>(place(tile) + kTileBytes, b + begin * b_row_stride,
                                          b_row_stride);
  }
};

template <typename T>
__device__ inline Columns<T> columns_of(const Heads& a, const Heads& b, int64_t first, int count,
                                        const Place& place, uint32_t places) {
  return {rows_of<T>(a, first, place),
          rows_of<T>(b, first, place),
          a.row_stride,
          b.row_stride,
          count,
          places};
}

// One tile after another, while the next is copied; the first was begun before. `prepare` runs when
// it and all that was copied with it has arrived. The loop begins with a wait, if an idle one at
// first: ended by one, it would stand twice in machine code.
template <typename Copy, typename Prepare, typename Use>
__device__ inline void for_each_tile(int num_tiles, const Copy& copy, const Prepare& prepare,
                                     const Use& use) {
  wait_for_copies();
  __syncthreads();
  prepare();
  int tile = 0;
#pragma unroll 1
  do {
    wait_for_copies();
    __syncthreads(); // this tile is here, and nobody reads the one before any more
    if (tile + 1 < num_tiles)
      copy(tile + 1);
    use(tile);
  } while (++tile < num_tiles);
}

constexpr int columns_bytes(bool one_tile) { return (one_tile ? 1 : 2) * 2 * kTileBytes; }

// Where a lane's row of ldmatrix begins: for columns as the n of a product, and for rows as its m
// or columns as its k. Chunk c and step s are at (tile + offset ^ c * 32) + s * kStepBytes.
constexpr int kStepBytes = kStep * kRowBytes;
constexpr int kMatrixBytes = 2 * kChunkBytes; // of 16 elements

__device__ inline uint32_t across_offset(int lane = threadIdx.x % kWarp) {
  return chunk_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

__device__ inline uint32_t along_offset(int lane = threadIdx.x % kWarp) {
  return chunk_offset(lane % 16, lane / 16);
}

// Left operands of kMmas products of 16 rows, 16 elements of a row at a time; 2 are a warp's rows.
template <int kMmas> using RowsOf = uint32_t[kMmas][4][4];
using Rows = RowsOf<2>;

__device__ inline void load_rows(Rows& rows, uint32_t tile, uint32_t along) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int k = 0; k < 4; ++k)
      load_matrices(rows[m][k], ((tile + along) ^ (k * kMatrixBytes)) + m * kStepBytes);
}

// Scores of rows with the 16 columns of a step. In [m][n]: elements 0, 1 are row lane / 4 of
// 16 and columns 2 * (lane % 4) + {0, 1} of 8; elements 2, 3 are 8 rows below.
template <int kMmas> using ScoresOf = float[kMmas][2][4];
using Scores = ScoresOf<2>;

template <typename T, int kOffset = 0, int kMmas>
__device__ inline void multiply_across(float (&scores)[kMmas][2][4],
                                       const uint32_t (&rows)[kMmas][4][4], uint32_t step_address) {
  constexpr float kZeros[4] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t columns[4];
    load_matrices<kOffset>(columns, step_address ^ (k * kMatrixBytes));
#pragma unroll
    for (int m = 0; m < kMmas; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float (&sums)[4] = scores[m][n];
        const float (&before)[4] = k == 0 ? kZeros : static_cast<const float (&)[4]>(sums);
        multiply<T>(sums, rows[m][k], columns[2 * n], columns[2 * n + 1], before);
      }
  }
}

// Columns that do not exist count for nothing, whatever their products with zeros are.
template <int kMmas>
__device__ inline void mask(float (&scores)[kMmas][2][4], int columns, float with) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (n * 8 + column + i >= columns)
#pragma unroll
        for (int m = 0; m < kMmas; ++m)
          scores[m][n][i] = scores[m][n][2 + i] = with;
}

// Sums [rows, 64]: += weights [rows, 16 columns] times the columns of a step.
template <int kMmas> using SumsOf = float[kMmas][8][4];
template <int kMmas> using WeightsOf = uint32_t[kMmas][4];
using Sums = SumsOf<2>;
using Weights = WeightsOf<2>;

template <typename T, int kMmas>
__device__ inline void round_weights(uint32_t (&to)[kMmas][4], const float (&from)[kMmas][2][4]) {
#pragma unroll
  for (int m = 0; m < kMmas; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to[m][i] = pack<T>(from[m][i / 2][i % 2 * 2], from[m][i / 2][i % 2 * 2 + 1]);
}

template <typename T, int kOffset = 0, int kMmas>
__device__ inline void multiply_along(float (&sums)[kMmas][8][4],
                                      const uint32_t (&weights)[kMmas][4], uint32_t step_address) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    uint32_t columns[4];
    load_matrices_transposed<kOffset>(columns, step_address ^ (n * kMatrixBytes));
#pragma unroll
    for (int m = 0; m < kMmas; ++m) {
      multiply<T>(sums[m][2 * n], weights[m], columns[0], columns[1]);
      multiply<T>(sums[m][2 * n + 1], weights[m], columns[2], columns[3]);
    }
  }
}

template <int kMmas> __device__ inline void clear(float (&sums)[kMmas][8][4]) {
#pragma unroll
  for (int m = 0; m < kMmas; ++m)
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[m][n][i] = 0.0f;
}

// Writes a warp's 32 rows times a factor by way of shared memory that no other warp uses, and that
// no lane reads any more: the global stores are whole 16-byte vectors. There is space for so many
// products of 16 rows at once.
template <typename T, int kMmas = 2>
__device__ inline void store_rows(T* to, int64_t row_stride, int count, const Sums& sums,
                                  float factor, unsigned char* staging) {
  const int lane = threadIdx.x % kWarp, chunk = lane % kRowChunks;
#pragma unroll
  for (int begin = 0; begin < 2; begin += kMmas) {
    if (begin > 0)
      __syncwarp(); // what was staged has been read
#pragma unroll
    for (int m = 0; m < kMmas; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float (&from)[8][4] = sums[begin + m];
        const int row = m * kMmaRows + half * 8 + lane / 4;
#pragma unroll
        for (int n = 0; n < 8; ++n)
          *reinterpret_cast<uint32_t*>(staging + chunk_offset(row, n) + lane % 4 * 4) =
              pack<T>(from[n][2 * half] * factor, from[n][2 * half + 1] * factor);
      }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kMmas * kMmaRows / 4; ++i) {
      const int staged = i * 4 + lane / kRowChunks, row = begin * kMmaRows + staged;
      const uint4 bits = *reinterpret_cast<const uint4*>(staging + chunk_offset(staged, chunk));
      if (row < count)
        __stwb(reinterpret_cast<uint4*>(to + row * row_stride) + chunk, bits);
    }
  }
}

} // namespace
} // namespace dinov2_fast
