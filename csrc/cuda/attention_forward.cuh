// The forward pass: softmax(q k^T * scale) v of 32 queries a warp, over tiles of 64 keys.
//
// Source: Dao, "FlashAttention-2", 2023 (sums rescaled by tile, normalised once at the end).
#pragma once

#include "cuda/attention_tiles.cuh"

#include <cfloat>

namespace dinov2_fast {
namespace {

// Of a warp's rows: sums of weighted values, and per row the largest score and the sum of weights,
// which each lane has of its own columns until the end. Scores count in units of scale_log2.
template <int kMmas> struct Running {
  SumsOf<kMmas> values;
  float highest[kMmas][2], total[kMmas][2];
};

// Where every score is -inf so far, subtracting -inf would make NaN of weights that are 0.
constexpr float kLowest = -FLT_MAX;

template <int kMmas> __device__ inline void start(Running<kMmas>& r) {
  clear(r.values);
#pragma unroll
  for (int m = 0; m < kMmas; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      r.highest[m][half] = kLowest;
      r.total[m][half] = 0.0f;
    }
}

// The maximum or sum of a row lies with four neighbouring lanes.
template <typename Combine> __device__ inline float over_row(float x, const Combine& combine) {
  x = combine(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return combine(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Raises the maxima to those of a tile, of which each lane has that of its columns, and rescales
// what was summed under the old ones. Only a row that grows by more than kGrowth is raised: a
// weight is 2^kGrowth at most then. In most tiles no lane has a score that large, and nobody asks
// for the maxima of rows.
template <int kMmas>
__device__ inline void raise(Running<kMmas>& r, const float (&largest)[kMmas][2], float scale) {
  constexpr float kGrowth = 8.0f;
  float growth = -INFINITY;
#pragma unroll
  for (int m = 0; m < kMmas; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      growth = fmaxf(growth, fmaf(largest[m][half], scale, -r.highest[m][half]));
  if (!__any_sync(0xffffffffu, growth > kGrowth))
    return;
#pragma unroll
  for (int m = 0; m < kMmas; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = r.highest[m][half];
      const float row = over_row(largest[m][half], [](float a, float b) { return fmaxf(a, b); });
      const float highest = fmaf(row, scale, -before) > kGrowth ? row * scale : before;
      const float rescale = exp2_approximate(before - highest);
      r.highest[m][half] = highest;
      r.total[m][half] *= rescale;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        r.values[m][n][2 * half] *= rescale;
        r.values[m][n][2 * half + 1] *= rescale;
      }
    }
}

// A tile of `num_keys` keys: all their scores first, then their weights and values. The keys fill
// kMaxSteps steps if kFull, else they may be fewer.
template <typename T, int kMaxSteps, bool kFull, int kMmas>
__device__ inline void attend(Running<kMmas>& r, const uint32_t (&queries)[kMmas][4][4],
                              uint32_t keys, uint32_t values, int num_keys, float scale) {
  const uint32_t across = keys + across_offset(), along = values + along_offset();
  const auto exists = [&](int step) { return kFull || step * kStep < num_keys; };
  ScoresOf<kMmas> scores[kMaxSteps];
  float largest[kMmas][2];
#pragma unroll
  for (int m = 0; m < kMmas; ++m)
    largest[m][0] = largest[m][1] = -INFINITY;
  unroll<kMaxSteps>([&](auto j) {
    if (!exists(j))
      return;
    multiply_across<T, j * kStepBytes>(scores[j], queries, across);
    if (!kFull && num_keys < (j + 1) * kStep)
      mask(scores[j], num_keys - j * kStep, -INFINITY);
#pragma unroll
    for (int m = 0; m < kMmas; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          largest[m][i / 2] = fmaxf(largest[m][i / 2], scores[j][m][n][i]);
  });
  raise(r, largest, scale);
  unroll<kMaxSteps>([&](auto j) {
    if (!exists(j))
      return;
#pragma unroll
    for (int m = 0; m < kMmas; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& weight = scores[j][m][n][i];
          weight = exp2_approximate(fmaf(weight, scale, -r.highest[m][i / 2]));
          r.total[m][i / 2] += weight;
        }
    WeightsOf<kMmas> weights;
    round_weights<T>(weights, scores[j]);
    multiply_along<T, j * kStepBytes>(r.values, weights, along);
  });
}

// A tile of keys, most of which are full.
template <typename T>
__device__ inline void attend_tile(Running<2>& r, const Rows& queries, uint32_t keys,
                                   uint32_t values, int num_keys, float scale) {
  if (num_keys == kColumns)
    attend<T, kSteps, true>(r, queries, keys, values, num_keys, scale);
  else
    attend<T, kSteps, false>(r, queries, keys, values, num_keys, scale);
}

// Normalises and writes a warp's rows; a query without keys has the output 0 and lse = -inf.
template <typename T, int kStagedMmas = 2>
__device__ inline void finish(const Params& p, const Place& place, int first, Running<2>& r,
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
  store_rows<T, kStagedMmas>(out, p.out.row_stride, count, r.values, 1.0f, staging);
}

// Softmax of negated scores runs on their maximum too: the sign of the scale moves to the queries.
template <int kMmas> __device__ inline void negate(uint32_t (&rows)[kMmas][4][4]) {
#pragma unroll
  for (int m = 0; m < kMmas; ++m)
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
  const auto copy = [&](int tile) {
    if (columns.count_of(tile) == kColumns)
      columns.template copy_full<kThreads>(tile);
    else
      columns.template copy<kThreads>(tile);
  };
  copy(0);

  const int warp_row = threadIdx.x / kWarp * kWarpRows;
  const bool active = first + warp_row < place.queries;
  Rows queries;
  Running<2> running;
  const auto prepare = [&] {
    if (!active)
      return;
    start(running);
    load_rows(queries, query_rows + warp_row * kRowBytes, along_offset());
    if (p.scale_log2 < 0.0f)
      negate(queries);
  };
  for_each_tile(columns.num_tiles(), copy, prepare, [&](int tile) {
    const uint32_t keys = columns.place(tile);
    if (active)
      attend_tile<T>(running, queries, keys, keys + kTileBytes, columns.count_of(tile),
                     fabsf(p.scale_log2));
  });
  if (active)
    finish<T>(p, place, first + warp_row, running, shared + warp_row * kRowBytes);
}

} // namespace
} // namespace dinov2_fast
