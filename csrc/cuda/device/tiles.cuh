// A matrix cut into tiles of 8 rows and 32 vectors, one a thread, and sums over its rows.
#pragma once

#include "cuda/device/limits.cuh"

#include <algorithm>
#include <cstdint>

namespace dinov2_fast {

constexpr int kTileLanes = 32;
constexpr int kTileRows = 8;
constexpr int kTileThreads = kTileLanes * kTileRows;
constexpr int64_t kTileCtas = 2048; // enough for the largest GPUs; a thread then has several rows

inline dim3 tile_block() { return dim3(kTileLanes, kTileRows); }

// The argument that says how wide a matrix is.
struct Width {
  const char* name;
  int64_t elements;
};

// CTAs for a matrix that is moved in vectors; num_partials is how many along the rows, if sums are
// wanted. That number comes from the caller and depends on the matrix alone, and so does the order
// of any sum.
inline dim3 tile_grid(const char* op, int64_t rows, Width width, int vector, int64_t num_partials) {
  const unsigned across = ctas_of(op, width.name, width.elements, kTileLanes * vector, kMaxAlongX);
  const int64_t down = std::min((rows + kTileRows - 1) / kTileRows, kTileCtas / across + 1);
  return dim3(across, num_partials > 0 ? ctas_of(op, "num_partials", num_partials, 1, kMaxAlongY)
                                       : static_cast<unsigned>(down));
}

template <int kVector> __device__ int64_t tile_column() {
  return (static_cast<int64_t>(blockIdx.x) * kTileLanes + threadIdx.x) * kVector;
}

// body(row) for the rows of this thread, if its column is one.
template <int kVector, typename Body>
__device__ void for_each_row(int64_t rows, int64_t columns, const Body& body) {
  if (tile_column<kVector>() >= columns)
    return;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kTileRows;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * kTileRows + threadIdx.y; row < rows;
       row += step)
    body(row);
}

// Hands the threads that `taken_column` names what the threads of a column hold. All threads of the
// CTA come here, also those past the last column; a barrier must lie between two calls, which share
// the tile.
template <int kVector>
__device__ void take_column(const float (&mine)[kVector], float (&of_column)[kTileRows]) {
  // Padded so that neither the stores, lane by lane, nor the loads, column by column, conflict.
  constexpr int kPadding = kVector > 1 ? kTileLanes / kVector : 0;
  __shared__ float tile[kTileRows][kVector][kTileLanes + kPadding];
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    tile[threadIdx.y][i][threadIdx.x] = mine[i];
  __syncthreads();
  const int within = threadIdx.y * kTileLanes + threadIdx.x;
  if (within >= kTileLanes * kVector)
    return;
#pragma unroll
  for (int row = 0; row < kTileRows; ++row)
    of_column[row] = tile[row][within % kVector][within / kVector];
}

// The column that `take_column` gave this thread, or -1.
template <int kVector> __device__ int64_t taken_column(int64_t columns) {
  const int within = threadIdx.y * kTileLanes + threadIdx.x;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kTileLanes * kVector + within;
  return within < kTileLanes * kVector && column < columns ? column : -1;
}

// Adds what the threads of a column have summed and writes it to a row of partial sums; called as
// `take_column` is.
template <int kVector>
__device__ void store_column_sums(const float (&sums)[kVector], float* partials, int64_t columns) {
  float of_rows[kTileRows];
  take_column(sums, of_rows);
  const int64_t column = taken_column<kVector>(columns);
  if (column < 0)
    return;
  float sum = 0.0f;
#pragma unroll
  for (int row = 0; row < kTileRows; ++row)
    sum += of_rows[row];
  partials[column] = sum;
}

} // namespace dinov2_fast
