// Rows over many prototypes: how the columns of a row are divided among CTAs and threads.
#pragma once

#include "cuda/device/reduce.cuh"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace dinov2_fast {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kLanes;
constexpr int64_t kSplitStep = 2048; // columns; a part of a row is a multiple of it

// Columns of each of num_splits parts of a row. The number comes from the caller and depends on
// the matrix alone, and so does the order of any sum.
inline int64_t columns_of_split(int64_t columns, int64_t num_splits) {
  const int64_t steps = (columns + kSplitStep - 1) / kSplitStep;
  return (steps + num_splits - 1) / num_splits * kSplitStep;
}

// Threads for a part of a row that is moved in vectors: short rows leave no warp idle.
inline dim3 row_block(int64_t columns, int vector) {
  const int64_t vectors = std::max<int64_t>((columns + vector - 1) / vector, 1);
  return dim3(static_cast<unsigned>(std::min<int64_t>((vectors + kLanes - 1) / kLanes, kRowWarps) *
                                    kLanes));
}

// body(k) for the first columns of this thread's vectors in part blockIdx.y of a row.
template <int kVector, typename Body>
__device__ void for_each_vector(int64_t columns, int64_t split_columns, const Body& body) {
  const int64_t begin = blockIdx.y * split_columns;
  const int64_t end = min(begin + split_columns, columns);
  for (int64_t k = begin + threadIdx.x * kVector; k < end; k += blockDim.x * kVector)
    body(k);
}

// What exponentials are relative to: their largest exponent, unless nothing is finite to subtract.
__device__ inline float base_of(float largest) { return isinf(largest) ? 0.0f : largest; }

} // namespace dinov2_fast
