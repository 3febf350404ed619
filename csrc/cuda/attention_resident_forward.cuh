// The forward pass of short sequences: a CTA holds all queries, keys and values of a sequence and
// head in shared memory, which every input enters once. 32 queries a warp meet the keys in tiles of
// 64, each a group of copies, so the first products run while the others arrive.
//
// Keys left (past 256) come first, where nothing is to be rescaled on their account. Queries left
// are 8 rows of one product of 16: every warp adds up 32 of the keys for them, and what the warps
// have is merged in shared memory. Source: Dao, "FlashAttention-2", 2023 (sums rescaled by tile,
// normalised once at the end).
#pragma once

#include "cuda/attention_forward.cuh"
#include "cuda/attention_resident.cuh"

namespace dinov2_fast {
namespace {

constexpr int kOwnedRows = kLeftWarps * kWarpRows;
constexpr int kSequenceBytes = kResidentRows<kLeftWarps> * kRowBytes;
constexpr int kForwardResidentBytes = 3 * kSequenceBytes; // queries, keys, values
constexpr int kTiles = kOwnedRows / kColumns;

// Starts copying what exists of a sequence, each tile of keys and values as a group. The first
// group has all queries and the keys and values left, too.
template <typename T>
__device__ inline void copy_sequence(const Params& p, const Place& place, uint32_t queries) {
  constexpr int kWarps = kLeftWarps, kRows = kResidentRows<kWarps>;
  const uint32_t keys = queries + kSequenceBytes, values = keys + kSequenceBytes;
  const T* q = rows_of<T>(p.q, place.first_query, place);
  const T* k = rows_of<T>(p.k, place.first_key, place);
  const T* v = rows_of<T>(p.v, place.first_key, place);
  const int query_end = (place.queries + kWarpRows - 1) / kWarpRows * kWarpRows;
  copy_span<T, kWarps>(queries, q, p.q.row_stride, 0, min(query_end, kRows), place.queries);
  if (place.keys > kOwnedRows) {
    copy_span<T, kWarps>(keys, k, p.k.row_stride, kOwnedRows, kRows, place.keys);
    copy_span<T, kWarps>(values, v, p.v.row_stride, kOwnedRows, kRows, place.keys);
  }
  const int key_end = (place.keys + kStep - 1) / kStep * kStep;
#pragma unroll 1
  for (int tile = 0; tile < kTiles; ++tile) {
    const int first = tile * kColumns, end = min(first + kColumns, key_end);
    copy_span<T, kWarps>(keys, k, p.k.row_stride, first, end, place.keys);
    copy_span<T, kWarps>(values, v, p.v.row_stride, first, end, place.keys);
    commit_copies();
  }
}

// Waits for this thread's copies of a tile after the first; there are as many groups if some are
// empty.
__device__ inline void wait_for_tile(int tile) {
  static_assert(kTiles == 4, "a wait for each");
  if (tile == 1)
    wait_for_older_copies<2>();
  else if (tile == 2)
    wait_for_older_copies<1>();
  else
    wait_for_older_copies<0>();
}

// The first keys that queries meet: those left.
template <typename T, int kMmas>
__device__ inline void attend_left(Running<kMmas>& r, const uint32_t (&queries)[kMmas][4][4],
                                   uint32_t keys, uint32_t values, int num_keys, float scale) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t offset = kOwnedRows * kRowBytes + chunk_offset(lane % 8, lane / 8);
  float scores[kMmas][4] = {};
  multiply_eight<T>(scores, queries, keys + offset);
  float largest[kMmas][2];
#pragma unroll
  for (int m = 0; m < kMmas; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (lane % 4 * 2 + i >= num_keys)
          scores[m][2 * half + i] = -INFINITY;
      largest[m][half] = fmaxf(scores[m][2 * half], scores[m][2 * half + 1]);
    }
  raise(r, largest, scale);
  WeightsOf<kMmas> weights;
#pragma unroll
  for (int m = 0; m < kMmas; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* weight = scores[m] + 2 * half;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        weight[i] = exp2_approximate(fmaf(weight[i], scale, -r.highest[m][half]));
        r.total[m][half] += weight[i];
      }
      weights[m][half] = pack<T>(weight[0], weight[1]);
      weights[m][2 + half] = 0; // of 16 keys the last 8
    }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t columns[4];
    load_matrices_transposed(columns, (values + offset) ^ (half * 4 * kChunkBytes));
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int m = 0; m < kMmas; ++m)
        multiply<T>(r.values[m][half * 4 + n], weights[m], columns[n], 0);
  }
}

// What a warp has of the queries left: 8 rows of 64 sums, in halves of each 8 channels, and so long
// that neither side has bank conflicts; then the largest score and the sum of weights of each row.
constexpr int kFloatBytes = static_cast<int>(sizeof(float));
constexpr int kPartHalf = kHeadDim / 2 + 4, kPartRow = 2 * kPartHalf;
constexpr int kPartSums = kLeftRows * kPartRow;
constexpr int kPartStride = kWarpRows * kRowBytes / kFloatBytes;
static_assert(kPartSums + 2 * kLeftRows <= kPartStride, "in the place of the warp's own queries");

// The queries left and this warp's 32 keys; the first warp takes the keys left, too.
template <typename T>
__device__ inline void attend_left_queries(const Params& p, const Place& place, uint32_t queries,
                                           uint32_t part) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t keys = queries + kSequenceBytes, values = keys + kSequenceBytes;
  RowsOf<1> rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a[4];
    load_matrices(a, (queries + kOwnedRows * kRowBytes + chunk_offset(lane % 8, lane / 8)) ^
                         (half * 4 * kChunkBytes));
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t (&row)[4] = rows[0][2 * half + k];
      row[0] = a[2 * k];
      row[2] = a[2 * k + 1];
      row[1] = row[3] = 0;
    }
  }
  if (p.scale_log2 < 0.0f)
    negate(rows);
  const float scale = fabsf(p.scale_log2);
  Running<1> r;
  start(r);
  if (warp == 0 && place.keys > kOwnedRows)
    attend_left<T>(r, rows, keys, values, place.keys - kOwnedRows, scale);
  const int first = warp * kWarpRows;
  if (first < place.keys)
    attend<T, kWarpRows / kStep, false>(r, rows, keys + first * kRowBytes,
                                        values + first * kRowBytes,
                                        min(kWarpRows, place.keys - first), scale);
  const float total = over_row(r.total[0][0], [](float a, float b) { return a + b; });
  const int channel = (lane % 4 < 2 ? 0 : kPartHalf) + lane % 2 * 2;
  const uint32_t sums = part + (lane / 4 * kPartRow + channel) * kFloatBytes;
#pragma unroll
  for (int n = 0; n < 8; ++n)
    store_shared(sums + n * 4 * kFloatBytes, make_float2(r.values[0][n][0], r.values[0][n][1]));
  if (lane % 4 == 0)
    store_shared(part + (kPartSums + lane / 4 * 2) * kFloatBytes,
                 make_float2(r.highest[0][0], total));
}

// Merges what the warps have of the queries left: a thread has 8 channels of a row.
template <typename T>
__device__ inline void merge_left_queries(const Params& p, const Place& place, const float* parts) {
  const int row = threadIdx.x / kRowChunks, chunk = threadIdx.x % kRowChunks;
  const int query = kOwnedRows + row;
  if (row >= kLeftRows || query >= place.queries)
    return;
  float highest = kLowest;
#pragma unroll
  for (int warp = 0; warp < kLeftWarps; ++warp)
    highest = fmaxf(highest, parts[warp * kPartStride + kPartSums + 2 * row]);
  float total = 0.0f, values[8] = {};
#pragma unroll
  for (int warp = 0; warp < kLeftWarps; ++warp) {
    const float* part = parts + warp * kPartStride;
    const float2 sum = reinterpret_cast<const float2*>(part + kPartSums)[row];
    const float factor = exp2_approximate(sum.x - highest);
    total = fmaf(sum.y, factor, total);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 four =
          *reinterpret_cast<const float4*>(part + row * kPartRow + half * kPartHalf + chunk * 4);
      values[half * 4] = fmaf(four.x, factor, values[half * 4]);
      values[half * 4 + 1] = fmaf(four.y, factor, values[half * 4 + 1]);
      values[half * 4 + 2] = fmaf(four.z, factor, values[half * 4 + 2]);
      values[half * 4 + 3] = fmaf(four.w, factor, values[half * 4 + 3]);
    }
  }
  const float factor = place.keys == 0 ? 0.0f : 1.0f / total;
  const auto two = [&](int i) { return pack<T>(values[i] * factor, values[i + 1] * factor); };
  const uint4 bits = make_uint4(two(0), two(2), two(4), two(6));
  T* out = rows_of<T>(p.out, place.first_query + query, place);
  __stwb(reinterpret_cast<uint4*>(out) + chunk, bits);
  if (chunk == 0)
    p.lse[place.head * p.num_queries + place.first_query + query] =
        (highest + log2_approximate(total)) * kLn2;
}

template <typename T>
__global__ void __launch_bounds__(kLeftWarps* kWarp, 1)
    attention_forward_resident_kernel(const Params p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const Place place = place_of(p);
  if (place.queries == 0)
    return;
  const uint32_t query_rows = shared_address(shared);
  const uint32_t keys = query_rows + kSequenceBytes, values = keys + kSequenceBytes;
  copy_sequence<T>(p, place, query_rows);
  wait_for_older_copies<kTiles - 1>();
  __syncthreads();

  const int warp_row = threadIdx.x / kWarp * kWarpRows;
  const int owned_keys = min(place.keys, kOwnedRows);
  const bool active = warp_row < place.queries;
  const float scale = fabsf(p.scale_log2);
  Rows queries;
  Running<2> running;
  if (active) {
    start(running);
    load_rows(queries, query_rows + warp_row * kRowBytes, along_offset());
    if (p.scale_log2 < 0.0f)
      negate(queries);
    if (place.keys > kOwnedRows)
      attend_left<T>(running, queries, keys, values, place.keys - kOwnedRows, scale);
  }
#pragma unroll 1
  for (int tile = 0;;) {
    const int first = tile * kColumns;
    if (active)
      attend_tile<T>(running, queries, keys + first * kRowBytes, values + first * kRowBytes,
                     min(kColumns, owned_keys - first), scale);
    if (++tile * kColumns >= owned_keys)
      break;
    wait_for_tile(tile);
    __syncthreads();
  }
  if (active)
    finish<T>(p, place, warp_row, running, shared + warp_row * kRowBytes);
  if (place.queries <= kOwnedRows)
    return;
  __syncwarp(); // what was staged has been read
  attend_left_queries<T>(p, place, query_rows, query_rows + warp_row * kRowBytes);
  __syncthreads();
  merge_left_queries<T>(p, place, reinterpret_cast<const float*>(shared));
}

} // namespace
} // namespace dinov2_fast
