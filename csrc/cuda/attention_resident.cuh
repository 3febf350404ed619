// What the kernels share that hold a whole sequence and head in one CTA, 32 rows a warp.
//
// 257 = 256 + 1: up to 8 rows past the warps' are "left", and cost a product of 8, not a warp.
#pragma once

#include "cuda/attention_tiles.cuh"

namespace dinov2_fast {
namespace {

constexpr int kLeftRows = 8;  // at most: the n of a product
constexpr int kLeftWarps = 8; // of a CTA that can have rows left
template <int kWarps> constexpr bool kHasLeft = kWarps == kLeftWarps;
template <int kWarps>
constexpr int kResidentRows = kWarps * kWarpRows + (kHasLeft<kWarps> ? kLeftRows : 0);

// The number of this thread, hidden: what is computed from it in a loop stays there, and takes no
// registers outside.
__device__ inline int hidden_thread() {
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread;
}

// Starts copying the rows from `first` to `end` of a sequence of `count` to their places; those
// that do not exist become zeros.
template <typename T, int kWarps>
__device__ inline void copy_span(uint32_t to, const T* from, int64_t row_stride, int first, int end,
                                 int count) {
  constexpr int kRowsAtOnce = kWarps * kWarp / kRowChunks;
  const int chunk = threadIdx.x % kRowChunks;
  from += chunk * (kHeadDim / kRowChunks);
  for (int row = first + static_cast<int>(threadIdx.x) / kRowChunks; row < end; row += kRowsAtOnce)
    copy_chunk_async(to + chunk_offset(row, chunk), from + row * row_stride, row < count);
}

// Products of rows with 8 columns.
template <typename T, int kMmas>
__device__ inline void multiply_eight(float (&products)[kMmas][4],
                                      const uint32_t (&rows)[kMmas][4][4], uint32_t columns) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t b[4];
    load_matrices(b, columns ^ (half * 4 * kChunkBytes));
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int m = 0; m < kMmas; ++m)
        multiply<T>(products[m], rows[m][2 * half + k], b[2 * k], b[2 * k + 1]);
  }
}

} // namespace
} // namespace dinov2_fast
