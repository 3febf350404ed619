// The forward pass of short sequences: a CTA holds all keys and values of a sequence and head in
// shared memory, which every input enters once. Four warps meet them twice, each time with 32
// queries a warp, in tiles of 64, each a group of copies: the first products run while the others
// arrive. Eight warps would need no second pass, but all that an SM has of registers, and nobody
// would compute while they load: of these CTAs two fit on an SM.
//
// Keys left (past 256) come first, where nothing is to be rescaled on their account. Queries left
// are 8 rows of one product of 16: every warp adds up 64 of the keys for them, and what the warps
// have is merged in shared memory. Source: Dao, "FlashAttention-2", 2023 (sums rescaled by tile,
// normalised once at the end).
#pragma once

#include "cuda/attention_forward.cuh"
#include "cuda/attention_resident.cuh"

namespace dinov2_fast {
namespace {

constexpr int kForwardWarps = 4; // of a CTA: two fit on an SM, and one computes while one loads
constexpr int kPasses = 2;       // of 32 queries a warp
constexpr int kPassRows = kForwardWarps * kWarpRows;
constexpr int kOwnedRows = kPasses * kPassRows;
constexpr int kSequenceRows = kOwnedRows + kLeftRows;
constexpr int kSequenceBytes = kSequenceRows * kRowBytes;
constexpr int kTiles = kOwnedRows / kColumns;

// What a warp has of the queries left: 8 rows of 64 sums, in halves of each 8 channels, and so long
// that neither side has bank conflicts; then the largest score and the sum of weights of each row.
constexpr int kFloatBytes = static_cast<int>(sizeof(float));
constexpr int kPartHalf = kHeadDim / 2 + 4, kPartRow = 2 * kPartHalf;
constexpr int kPartSums = kLeftRows * kPartRow;

// Shared memory of a warp alone: 16 rows of queries, of output, or its part of the queries left.
constexpr int kWarpBytes =
    ((kPartSums + 2 * kLeftRows) * kFloatBytes + kRowBytes - 1) / kRowBytes * kRowBytes;
static_assert(kWarpBytes >= kMmaRows * kRowBytes, "16 rows fit");
constexpr int kForwardResidentBytes = 2 * kSequenceBytes + kForwardWarps * kWarpBytes;

// Starts copying what exists of a sequence's keys and values, each tile as a group. The first group
// has the keys and values left, too.
template <typename T>
__device__ inline void copy_sequence(const Params& p, const Place& place, uint32_t keys) {
  constexpr int kWarps = kForwardWarps;
  const uint32_t values = keys + kSequenceBytes;
  const T* k = rows_of<T>(p.k, place.first_key, place);
  const T* v = rows_of<T>(p.v, place.first_key, place);
  if (place.keys > kOwnedRows) {
    copy_span<T, kWarps>(keys, k, p.k.row_stride, kOwnedRows, kSequenceRows, place.keys);
    copy_span<T, kWarps>(values, v, p.v.row_stride, kOwnedRows, kSequenceRows, place.keys);
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

// Queries on their way from memory to a warp's operands: chunks of four rows a vector.
template <int kVectors> struct Fetched {
  uint4 vectors[kVectors];
};

// Starts loading the queries from `first` on; those that do not exist are zeros.
template <typename T, int kVectors>
__device__ inline void fetch(Fetched<kVectors>& to, const Params& p, const Place& place,
                             int first) {
  const int lane = threadIdx.x % kWarp, count = place.queries - first;
  const T* rows = rows_of<T>(p.q, place.first_query + first, place);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int row = i * 4 + lane / kRowChunks;
    to.vectors[i] = make_uint4(0, 0, 0, 0);
    if (row < count)
      to.vectors[i] =
          __ldg(reinterpret_cast<const uint4*>(rows + row * p.q.row_stride) + lane % kRowChunks);
  }
}

// Stores four rows for each vector from `begin` on to the warp's own shared memory. What is there
// was read by this very lane (store_rows), or by all lanes at once (ldmatrix): it is not waited
// for.
template <int kRows, int kVectors>
__device__ inline void stage(uint32_t staging, const Fetched<kVectors>& from, int begin) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kRows / 4; ++i)
    store_shared(staging + chunk_offset(i * 4 + lane / kRowChunks, lane % kRowChunks),
                 from.vectors[begin + i]);
  __syncwarp();
}

// A warp's 32 queries as operands, 16 at a time.
template <int kVectors>
__device__ inline void load_queries(Rows& rows, const Fetched<kVectors>& from, uint32_t staging) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    stage<kMmaRows>(staging, from, m * kMmaRows / 4);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      load_matrices(rows[m][k], (staging + along_offset()) ^ (k * kMatrixBytes));
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

// The queries left and this warp's 32 keys of each 128; the first warp takes the keys left, too.
template <typename T>
__device__ inline void attend_left_queries(const Params& p, const Place& place, uint32_t keys,
                                           uint32_t staging) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t values = keys + kSequenceBytes;
  Fetched<kLeftRows / 4> fetched;
  fetch<T>(fetched, p, place, kOwnedRows);
  stage<kLeftRows>(staging, fetched, 0);
  RowsOf<1> rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a[4];
    load_matrices(a, (staging + chunk_offset(lane % 8, lane / 8)) ^ (half * 4 * kChunkBytes));
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
#pragma unroll 1
  for (int first = warp * kWarpRows; first < min(place.keys, kOwnedRows); first += kPassRows)
    attend<T, kWarpRows / kStep, false>(r, rows, keys + first * kRowBytes,
                                        values + first * kRowBytes,
                                        min(kWarpRows, place.keys - first), scale);
  const float total = over_row(r.total[0][0], [](float a, float b) { return a + b; });
  const int channel = (lane % 4 < 2 ? 0 : kPartHalf) + lane % 2 * 2;
  const uint32_t sums = staging + (lane / 4 * kPartRow + channel) * kFloatBytes;
#pragma unroll
  for (int n = 0; n < 8; ++n)
    store_shared(sums + n * 4 * kFloatBytes, make_float2(r.values[0][n][0], r.values[0][n][1]));
  if (lane % 4 == 0)
    store_shared(staging + (kPartSums + lane / 4 * 2) * kFloatBytes,
                 make_float2(r.highest[0][0], total));
}

// Merges what the warps have of the queries left: a thread has 8 channels of a row.
template <typename T>
__device__ inline void merge_left_queries(const Params& p, const Place& place, const float* parts) {
  constexpr int kStride = kWarpBytes / kFloatBytes;
  const int row = threadIdx.x / kRowChunks, chunk = threadIdx.x % kRowChunks;
  const int query = kOwnedRows + row;
  if (row >= kLeftRows || query >= place.queries)
    return;
  float highest = kLowest;
#pragma unroll
  for (int warp = 0; warp < kForwardWarps; ++warp)
    highest = fmaxf(highest, parts[warp * kStride + kPartSums + 2 * row]);
  float total = 0.0f, values[8] = {};
#pragma unroll
  for (int warp = 0; warp < kForwardWarps; ++warp) {
    const float* part = parts + warp * kStride;
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
__global__ void __launch_bounds__(kForwardWarps* kWarp, 2)
    attention_forward_resident_kernel(const Params p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const Place place = place_of(p);
  if (place.queries == 0)
    return;
  const uint32_t keys = shared_address(shared), values = keys + kSequenceBytes;
  const int warp = threadIdx.x / kWarp;
  unsigned char* staging = shared + 2 * kSequenceBytes + warp * kWarpBytes;
  Fetched<kWarpRows / 4> fetched;
  fetch<T>(fetched, p, place, warp * kWarpRows);
  copy_sequence<T>(p, place, keys);

  const int owned_keys = min(place.keys, kOwnedRows);
  const float scale = fabsf(p.scale_log2);
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const int warp_row = pass * kPassRows + warp * kWarpRows;
    const bool active = warp_row < place.queries;
    Rows queries;
    Running<2> running;
    if (active) {
      load_queries(queries, fetched, shared_address(staging));
      if (p.scale_log2 < 0.0f)
        negate(queries);
      start(running);
    }
    // Keys and values arrive in the first pass, and stay.
    if (pass == 0) {
      wait_for_older_copies<kTiles - 1>();
      __syncthreads();
    }
    if (active && place.keys > kOwnedRows)
      attend_left<T>(running, queries, keys, values, place.keys - kOwnedRows, scale);
#pragma unroll 1
    for (int tile = 0;;) {
      const int first = tile * kColumns;
      if (active)
        attend_tile<T>(running, queries, keys + first * kRowBytes, values + first * kRowBytes,
                       min(kColumns, owned_keys - first), scale);
      if (++tile * kColumns >= owned_keys)
        break;
      if (pass == 0) {
        wait_for_tile(tile);
        __syncthreads();
      }
    }
    if (pass + 1 < kPasses)
      fetch<T>(fetched, p, place, warp_row + kPassRows);
    if (active)
      finish<T, 1>(p, place, warp_row, running, staging);
  }
  if (place.queries <= kOwnedRows)
    return;
  attend_left_queries<T>(p, place, keys, shared_address(staging));
  __syncthreads();
  merge_left_queries<T>(p, place, reinterpret_cast<const float*>(shared + 2 * kSequenceBytes));
}

} // namespace
} // namespace dinov2_fast
