// Sinkhorn-Knopp on CUDA: the two passes of an iteration over scores [R, K]; what processes
// exchange in between is Python's.
//
// Columns: largest score and sum of exp relative to it. A CTA has the columns of a tile and some of
// the rows; what the CTAs of a column found is put together by a second pass.
// Rows: logarithm of the sum of exp. A CTA has a few rows, which share the columns' terms, or a
// part of their columns; a second pass puts the parts together.
#include "check.hpp"
#include "cuda/device/launch.cuh"
#include "cuda/device/limits.cuh"
#include "cuda/device/long_rows.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/run.cuh"
#include "cuda/device/tiles.cuh"
#include "cuda/device/vector.cuh"
#include "keywords.hpp"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

constexpr int kRowBatch = 4; // rows of a CTA that works along rows

// Rows that a thread has on their way in a column: 32 bytes of vectors, which fit in registers.
template <int kVector> constexpr int kColumnBatch = kVector == 8 ? 2 : 4;

struct ColumnsParams {
  const void* logits;     // [R, K]
  const float* log_v;     // [R]
  float* largest;         // [K]
  float* sums;            // [K] of exp(scores - largest)
  float* partial_largest; // [num_partials, K]; with one partial that is largest
  float* partial_sums;    // [num_partials, K]
  int64_t rows;           // R
  int64_t columns;        // K
  int64_t row_stride;
  int64_t num_partials;
  float scale; // 1 / temperature
};

struct RowsParams {
  const void* logits;     // [R, K]
  const float* log_u;     // [K]
  float* lse;             // [R]
  float* partial_largest; // [R, num_splits], or null: one part
  float* partial_sums;    // [R, num_splits]
  int64_t rows;           // R
  int64_t columns;        // K
  int64_t row_stride;
  int64_t num_splits;
  int64_t split_columns;
  float scale; // 1 / temperature
};

// Logarithm of a sum of exponentials, as the largest exponent and the sum relative to it.
struct LogSum {
  float largest = -INFINITY; // NaN never wins; it comes back in the sum
  float sum = 0.0f;

  // Makes the sum relative to an exponent that is not lower.
  template <typename T = float> __device__ void raise_to(float higher) {
    sum *= exponential<T>(largest - base_of(higher));
    largest = higher;
  }

  template <typename T, int N> __device__ void add(const float (&scores)[N]) {
    float higher = largest;
#pragma unroll
    for (int i = 0; i < N; ++i)
      higher = fmaxf(higher, scores[i]);
    raise_to<T>(higher);
    const float base = base_of(higher);
#pragma unroll
    for (int i = 0; i < N; ++i)
      sum += exponential<T>(scores[i] - base);
  }

  __device__ float log() const { return base_of(largest) + logf(sum); }
};

// Puts together what the threads of a column hold, and writes it as a row of partial sums.
template <int kVector>
__device__ void store_columns(const LogSum (&mine)[kVector], float* largest, float* sums,
                              int64_t columns) {
  float values[kVector], largest_of[kTileRows], sums_of[kTileRows];
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    values[i] = mine[i].largest;
  take_column(values, largest_of);
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    values[i] = mine[i].sum;
  __syncthreads();
  take_column(values, sums_of);
  const int64_t column = taken_column<kVector>(columns);
  if (column < 0)
    return;
  LogSum whole;
#pragma unroll
  for (int row = 0; row < kTileRows; ++row)
    whole.largest = fmaxf(whole.largest, largest_of[row]);
#pragma unroll
  for (int row = 0; row < kTileRows; ++row) {
    LogSum part{largest_of[row], sums_of[row]};
    part.raise_to(whole.largest);
    whole.sum += part.sum;
  }
  largest[column] = whole.largest;
  sums[column] = whole.sum;
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kTileThreads, ctas_at_half(kTileThreads))
    sinkhorn_columns_kernel(const ColumnsParams p) {
  constexpr int kBatch = kColumnBatch<kVector>;
  const int64_t column = tile_column<kVector>();
  LogSum found[kVector];
  const int64_t step = static_cast<int64_t>(gridDim.y) * kTileRows;
  int64_t row = static_cast<int64_t>(blockIdx.y) * kTileRows + threadIdx.y;
  for (row = column < p.columns ? row : p.rows; row < p.rows; row += kBatch * step) {
    Vector<T, kVector> loaded[kBatch] = {};
    float shift[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      shift[i] = -INFINITY; // past the last row: no weight
      if (row + i * step < p.rows) {
        const T* logits = static_cast<const T*>(p.logits) + (row + i * step) * p.row_stride;
        loaded[i] = load_vector<T, kVector>(logits + column);
        shift[i] = p.log_v[row + i * step];
      }
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      float scores[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        scores[i] = to_float(loaded[i].at[j]) * p.scale + shift[i];
      found[j].template add<T>(scores);
    }
  }
  store_columns(found, p.partial_largest + blockIdx.y * p.columns,
                p.partial_sums + blockIdx.y * p.columns, p.columns);
}

__global__ void __launch_bounds__(kTileThreads)
    sinkhorn_columns_finish_kernel(const ColumnsParams p) {
  const int64_t column = tile_column<1>();
  LogSum found[1];
  for_each_row<1>(p.num_partials, p.columns, [&](int64_t partial) {
    LogSum part{p.partial_largest[partial * p.columns + column],
                p.partial_sums[partial * p.columns + column]};
    const float higher = fmaxf(found[0].largest, part.largest);
    found[0].raise_to(higher);
    part.raise_to(higher);
    found[0].sum += part.sum;
  });
  store_columns(found, p.largest, p.sums, p.columns);
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kRowThreads, ctas_at_half(kRowThreads))
    sinkhorn_rows_kernel(const RowsParams p) {
  __shared__ float largest_of_warps[kRowWarps][kRowBatch], sums_of_warps[kRowWarps][kRowBatch];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRowBatch;
  const int num_rows = static_cast<int>(min(p.rows - first, static_cast<int64_t>(kRowBatch)));
  LogSum found[kRowBatch];
  for_each_vector<kVector>(p.columns, p.split_columns, [&](int64_t k) {
    const T* logits = static_cast<const T*>(p.logits) + first * p.row_stride + k;
    const auto log_u = load_vector<float, kVector>(p.log_u + k);
    Vector<T, kVector> loaded[kRowBatch];
#pragma unroll
    for (int i = 0; i < kRowBatch; ++i)
      if (i < num_rows)
        loaded[i] = load_vector<T, kVector>(logits + i * p.row_stride);
#pragma unroll
    for (int i = 0; i < kRowBatch; ++i) {
      float scores[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j)
        scores[j] = to_float(loaded[i].at[j]) * p.scale + log_u.at[j];
      if (i < num_rows)
        found[i].template add<T>(scores);
    }
  });
  float largest[kRowBatch], sums[kRowBatch];
#pragma unroll
  for (int i = 0; i < kRowBatch; ++i)
    largest[i] = found[i].largest;
  block_reduce<Max>(largest, largest_of_warps);
#pragma unroll
  for (int i = 0; i < kRowBatch; ++i) {
    found[i].raise_to(largest[i]);
    sums[i] = found[i].sum;
  }
  block_reduce<Sum>(sums, sums_of_warps);
#pragma unroll
  for (int i = 0; i < kRowBatch; ++i) {
    if (threadIdx.x != i || i >= num_rows)
      continue;
    if (p.num_splits == 1) {
      p.lse[first + i] = LogSum{largest[i], sums[i]}.log();
    } else {
      p.partial_largest[(first + i) * p.num_splits + blockIdx.y] = largest[i];
      p.partial_sums[(first + i) * p.num_splits + blockIdx.y] = sums[i];
    }
  }
}

// One warp a row.
__global__ void __launch_bounds__(kRowThreads) sinkhorn_rows_finish_kernel(const RowsParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kLanes;
  if (row >= p.rows)
    return;
  const float* largest = p.partial_largest + row * p.num_splits;
  const float* sums = p.partial_sums + row * p.num_splits;
  LogSum whole;
  for (int64_t i = threadIdx.x % kLanes; i < p.num_splits; i += kLanes)
    whole.largest = fmaxf(whole.largest, largest[i]);
  whole.largest = warp_max(whole.largest);
  for (int64_t i = threadIdx.x % kLanes; i < p.num_splits; i += kLanes) {
    LogSum part{largest[i], sums[i]};
    part.raise_to(whole.largest);
    whole.sum += part.sum;
  }
  whole.sum = warp_sum(whole.sum);
  if (threadIdx.x % kLanes == 0)
    p.lse[row] = whole.log();
}

void columns(const py::kwargs& a) {
  constexpr const char* op = "sinkhorn_columns_cuda";
  const auto largest = pointer<float>(a, "largest"), sums = pointer<float>(a, "sums");
  const auto partials = pointer<float>(a, "partials"); // [2, num_partials, K], or null
  const auto columns = keyword<int64_t>(a, "columns");
  const auto num_partials = keyword<int64_t>(a, "num_partials");
  const ColumnsParams p{pointer<const void>(a, "logits"),
                        pointer<const float>(a, "log_v"),
                        largest,
                        sums,
                        num_partials == 1 ? largest : partials,
                        num_partials == 1 ? sums : partials + num_partials * columns,
                        keyword<int64_t>(a, "rows"),
                        columns,
                        keyword<int64_t>(a, "row_stride"),
                        num_partials,
                        keyword<float>(a, "scale")};
  require_not_negative(op, "rows", p.rows);
  require_not_negative(op, "columns", columns);
  require_positive(op, "num_partials", num_partials);
  require_matrix(op, "logits", p.logits, p.rows, columns, p.row_stride, false);
  if (columns == 0)
    return; // a grid of no blocks is an error to CUDA
  if (p.rows > 0)
    require_pointer(op, "log_v", p.log_v);
  require_pointer(op, "largest", largest);
  require_pointer(op, "sums", sums);
  if (num_partials > 1)
    require_pointer(op, "partials", partials);
  run_in_vectors<__half>(
      op, a, columns, {{p.logits, p.row_stride}}, true, [&](auto lane, cudaStream_t stream) {
        using L = decltype(lane);
        const dim3 grid = tile_grid(op, p.rows, {"columns", columns}, L::kVector, num_partials);
        const dim3 finish_grid = tile_grid(op, 1, {"columns", columns}, 1, 1);
        const cudaError_t status = launch<sinkhorn_columns_kernel<typename L::type, L::kVector>>(
            grid, tile_block(), 0, stream, p);
        if (num_partials == 1 || status != cudaSuccess)
          return status;
        return launch<sinkhorn_columns_finish_kernel>(finish_grid, tile_block(), 0, stream, p);
      });
}

void rows(const py::kwargs& a) {
  constexpr const char* op = "sinkhorn_rows_cuda";
  const auto partials = pointer<float>(a, "partials"); // [2, R, num_splits], or null
  const auto rows = keyword<int64_t>(a, "rows"), columns = keyword<int64_t>(a, "columns");
  const auto num_splits = keyword<int64_t>(a, "num_splits");
  require_positive(op, "num_splits", num_splits);
  const RowsParams p{pointer<const void>(a, "logits"),
                     pointer<const float>(a, "log_u"),
                     pointer<float>(a, "lse"),
                     partials,
                     partials + rows * num_splits,
                     rows,
                     columns,
                     keyword<int64_t>(a, "row_stride"),
                     num_splits,
                     columns_of_split(columns, num_splits),
                     keyword<float>(a, "scale")};
  require_not_negative(op, "rows", rows);
  require_not_negative(op, "columns", columns);
  require_matrix(op, "logits", p.logits, rows, columns, p.row_stride, false);
  if (rows == 0)
    return;
  if (columns > 0)
    require_pointer(op, "log_u", p.log_u);
  require_pointer(op, "lse", p.lse);
  require((partials != nullptr) == (num_splits > 1), op,
          "expected partials if and only if there are several splits");
  run_in_vectors<float>(
      op, a, columns, {{p.logits, p.row_stride}}, whole_vectors<float, 4>(p.log_u, 0),
      [&](auto lane, cudaStream_t stream) {
        using L = decltype(lane);
        const dim3 grid(ctas_of(op, "rows", rows, kRowBatch, kMaxAlongX),
                        ctas_of(op, "num_splits", num_splits, 1, kMaxAlongY));
        const dim3 block = row_block(std::min(columns, p.split_columns), L::kVector);
        const cudaError_t status =
            launch<sinkhorn_rows_kernel<typename L::type, L::kVector>>(grid, block, 0, stream, p);
        if (num_splits == 1 || status != cudaSuccess)
          return status;
        const dim3 finish_grid(ctas_of(op, "rows", rows, kRowWarps, kMaxAlongX));
        return launch<sinkhorn_rows_finish_kernel>(finish_grid, dim3(kRowThreads), 0, stream, p);
      });
}

} // namespace
} // namespace dinov2_fast

void bind_sinkhorn_cuda(py::module_& m) {
  using namespace dinov2_fast;
  m.def("sinkhorn_columns_cuda", &columns,
        "logits [R, K], log_v [R], partials [2, num_partials, K] or, for one, 0 -> largest of "
        "logits * scale + log_v and sums of exp relative to it, both [K].");
  m.def("sinkhorn_rows_cuda", &rows,
        "logits [R, K], log_u [K], partials [2, R, num_splits] or, for one, 0 -> lse [R] of "
        "logits * scale + log_u; pointers, sizes and row stride in elements.");
}
