// The forward pass: softmax(q k^T * scale) v of 32 queries a warp, over tiles of 64 keys.
//
// Source: Dao, "FlashAttention-2", 2023 (sums rescaled by tile, normalised once at the end).
#pragma once

#include "cuda/attention_tiles.cuh"

namespace dinov2_fast {
namespace {

// Of one warp: sums of weighted values, and per row the largest score and the sum of weights, which
// each lane has of its own columns until the end. Scores count in units of scale_log2.
struct Running {
  Sums values;
  float highest[2][2], total[2][2];
};

__device__ inline void start(Running& r) {
  clear(r.values);
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      r.highest[m][half] = -INFINITY;
      r.total[m][half] = 0.0f;
    }
}

// The maximum or sum of a row lies with four neighbouring lanes.
template <typename Combine> __device__ inline float over_row(float x, const Combine& combine) {
  x = combine(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return combine(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Raises the maximum to that of a tile, and rescales what was summed under the old one.
// What to subtract from the tile's scores is in `base`.
__device__ inline void raise(Running& r, const Scores (&scores)[kSteps], int steps, float scale,
                             float (&base)[2][2]) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tile = -INFINITY;
#pragma unroll
      for (int j = 0; j < kSteps; ++j)
        if (j < steps)
#pragma unroll
          for (int n = 0; n < 2; ++n)
            tile = fmaxf(tile, fmaxf(scores[j][m][n][2 * half], scores[j][m][n][2 * half + 1]));
      tile = over_row(tile, [](float a, float b) { return fmaxf(a, b); });
      const float highest = fmaxf(r.highest[m][half], tile * scale);
      // Where every score is -inf so far, subtracting -inf would make NaN of weights that are 0.
      base[m][half] = highest == -INFINITY ? 0.0f : highest;
      const float rescale = exp2_approximate(r.highest[m][half] - base[m][half]);
      r.highest[m][half] = highest;
      r.total[m][half] *= rescale;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        r.values[m][n][2 * half] *= rescale;
        r.values[m][n][2 * half + 1] *= rescale;
      }
    }
}

// One tile of `keys` keys, at most 64: all their scores first, then their weights and values.
template <typename T>
__device__ inline void attend(Running& r, const Rows& queries, uint32_t tile, int keys,
                              float scale) {
  const int steps = (keys + kStep - 1) / kStep;
  const uint32_t across = tile + across_offset(), along = tile + kTileBytes + along_offset();
  Scores scores[kSteps];
#pragma unroll
  for (int j = 0; j < kSteps; ++j)
    if (j < steps) {
      multiply_across<T>(scores[j], queries, across + j * kStepBytes);
      if (keys < (j + 1) * kStep)
        mask(scores[j], keys - j * kStep, -INFINITY);
    }
  float base[2][2];
  raise(r, scores, steps, scale, base);
#pragma unroll
  for (int j = 0; j < kSteps; ++j)
    if (j < steps) {
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float weight = exp2_approximate(fmaf(scores[j][m][n][i], scale, -base[m][i / 2]));
            r.total[m][i / 2] += weight;
            scores[j][m][n][i] = weight;
          }
      Weights weights;
      round_weights<T>(weights, scores[j]);
      multiply_along<T>(r.values, weights, along + j * kStepBytes);
    }
}

// Normalises and writes a warp's rows; a query without keys has the output 0 and lse = -inf.
template <typename T>
__device__ inline void finish(const Params& p, const Place& place, int first, Running& r,
                              unsigned char* staging) {
  const int lane = threadIdx.x % kWarp, count = place.queries - first;
  float* lse = p.lse + place.head * p.num_queries + place.first_query + first;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = over_row(r.total[m][half], [](float a, float b) { return a + b; });
      const float factor = place.keys == 0 ? 0.0f : 1.0f / total;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        r.values[m][n][2 * half] *= factor;
        r.values[m][n][2 * half + 1] *= factor;
      }
      const int row = m * kMmaRows + half * 8 + lane / 4;
      if (lane % 4 == 0 && row < count)
        lse[row] = (r.highest[m][half] + log2_approximate(total)) * kLn2;
    }
  T* out = rows_of<T>(p.out, place.first_query + first, place);
  store_rows(out, p.out.row_stride, count, r.values, 1.0f, staging);
}

// Softmax of negated scores runs on their maximum too: the sign of the scale moves to the queries.
__device__ inline void negate(Rows& rows) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        rows[m][k][i] ^= 0x80008000u;
}

template <int kWarps> constexpr int forward_shared_bytes(bool one_tile) {
  return kWarps * kWarpRows * kRowBytes + columns_bytes(one_tile);
}

template <typename T, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp) attention_forward_kernel(const Params p) {
  constexpr int kThreads = kWarps * kWarp, kRows = kWarps * kWarpRows;
  extern __shared__ __align__(1024) unsigned char shared[];
  const Place place = place_of(p);
  const int first = place.block * kRows;
  if (first >= place.queries)
    return;
  const uint32_t query_rows = shared_address(shared);
  copy_rows<T, kRows, kThreads, kWarpRows>(query_rows,
                                           rows_of<T>(p.q, place.first_query + first, place),
                                           p.q.row_stride, min(kRows, place.queries - first));
  const auto columns =
      columns_of<T>(p.k, p.v, place.first_key, place.keys, place, query_rows + kRows * kRowBytes);
  const auto copy = [&](int tile) { columns.template copy<kThreads>(tile); };
  copy(0);

  const int warp_row = threadIdx.x / kWarp * kWarpRows;
  const bool active = first + warp_row < place.queries;
  Rows queries;
  Running running;
  const auto prepare = [&] {
    if (!active)
      return;
    start(running);
    load_rows(queries, query_rows + warp_row * kRowBytes, along_offset());
    if (p.scale_log2 < 0.0f)
      negate(queries);
  };
  for_each_tile(columns.num_tiles(), copy, prepare, [&](int tile) {
    if (active)
      attend<T>(running, queries, columns.place(tile), columns.count_of(tile), fabsf(p.scale_log2));
  });
  if (active)
    finish<T>(p, place, first + warp_row, running, shared + warp_row * kRowBytes);
}

} // namespace
} // namespace dinov2_fast
