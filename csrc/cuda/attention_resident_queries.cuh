// What the backward pass in one kernel has in shared memory, and how tiles of queries get there:
// with dO and, for delta = rowsum(dO * O), output.
#pragma once

#include "cuda/attention_backward.cuh"
#include "cuda/attention_resident.cuh"

namespace dinov2_fast {
namespace {

constexpr int kQueries = 64; // of a tile
constexpr int kQueryTile = kQueries * kRowBytes;
constexpr int kBlockBytes = kWarpRows * kMatrixBytes; // 32 rows of 16 channels
static_assert(kLeftWarps * 8 == kQueries, "a warp has the scores of keys left and 8 queries");
static_assert(kTileColumns == kQueries, "tiles are square");

// Where things lie in shared memory, in bytes. The gradients of scores are a tile whose rows are
// keys and whose columns are queries. With one tile of queries there is no place for outputs, the
// gradients lie where the warp's own values were, which are in registers, and dQ is staged where
// the queries were: four CTAs fit on an SM.
template <int kWarps> struct Layout {
  static constexpr int kKeys = kWarps * kWarpRows;
  static constexpr int kRows = kResidentRows<kWarps>;
  static constexpr bool kOneTile = kRows <= kQueries; // of queries, of which there are no more
  static constexpr int kValues = kRows * kRowBytes;
  static constexpr int kTiles = 2 * kValues;
  static constexpr int kTilePlace = 3 * kQueryTile; // queries, d_out, out
  static constexpr int kTilesEnd = kTiles + 2 * (kOneTile ? kQueryTile : kTilePlace);
  static constexpr int kScores = kOneTile ? kValues : kTilesEnd;
  static constexpr int kLeftScores = kTilesEnd + (kOneTile ? 0 : kKeys * kRowBytes);
  static constexpr int kLeftWeights = kLeftScores + kLeftRows * kRowBytes;
  static constexpr int kSums = kLeftScores + (kHasLeft<kWarps> ? 2 * kLeftRows * kRowBytes : 0);
  static constexpr int kLse = kSums + 2 * kQueries * static_cast<int>(sizeof(float));
  static constexpr int kSumsEnd = kLse + kQueries * static_cast<int>(sizeof(float));
  static constexpr int kStagingBytes = 2 * kTileColumns / kMmaRows * kBlockBytes;
  static constexpr int kStaging = kOneTile ? kTiles : kSumsEnd;
  static constexpr int kPlace = kSumsEnd + (kOneTile ? 0 : kStagingBytes);
  static_assert(!kOneTile || kStagingBytes <= kQueryTile, "dQ is staged where queries were");
  static constexpr int kBytes = kPlace + static_cast<int>(sizeof(Place));

  static __device__ int tile(int number) {
    return kTiles + (kOneTile ? 0 : number % 2 * kTilePlace);
  }
};

// Queries of a tile, up to whole steps.
__device__ inline int steps_of(const Place& place, int tile) {
  return (min(kQueries, place.queries - tile * kQueries) + kStep - 1) / kStep;
}

// Copies a tile of queries. A thread copies a chunk of a row of each kind, and the thread of a
// row's first chunk lse: what a thread copied it can read without a barrier. A query that does not
// exist is the last once more: its scores are numbers if those are, where 0 times a key may be NaN.
template <typename T, int kWarps>
__device__ inline void copy_queries(const Params& p, const Place& place, int tile,
                                    uint32_t shared) {
  constexpr int kRowsAtOnce = kWarps * kWarp / kRowChunks;
  using L = Layout<kWarps>;
  const int thread = hidden_thread();
  const int chunk = thread % kRowChunks, element = chunk * (kHeadDim / kRowChunks);
  const int end = steps_of(place, tile) * kStep;
  for (int row = thread / kRowChunks; row < end; row += kRowsAtOnce) {
    const int number = tile * kQueries + row;
    const bool exists = number < place.queries;
    const int64_t query = place.first_query + min(number, place.queries - 1);
    const uint32_t to = shared + L::tile(tile) + chunk_offset(row, chunk);
    copy_chunk_async(to, rows_of<T>(p.q, query, place) + element, true);
    copy_chunk_async(to + kQueryTile, rows_of<T>(p.d_out, query, place) + element, exists);
    if constexpr (!L::kOneTile)
      copy_chunk_async(to + 2 * kQueryTile, rows_of<T>(p.out, query, place) + element, exists);
    if (chunk == 0)
      copy_float_async(shared + L::kLse + row * sizeof(float),
                       p.lse + place.head * p.num_queries + query, exists);
  }
}

// (lse in units of exp2, delta) of a tile's row, from a chunk of dO and output of each of eight
// lanes, and from lse that the first has copied. The weights of a query that does not exist are
// exp2(-inf).
template <typename T, int kWarps>
__device__ inline void sum_row(const Place& place, int tile, int row, const uint4& d_out,
                               const uint4& out, unsigned char* shared) {
  using L = Layout<kWarps>;
  float delta = dot<T>(d_out, out);
#pragma unroll
  for (int distance = 1; distance < kRowChunks; distance *= 2)
    delta += __shfl_xor_sync(0xffffffffu, delta, distance);
  if (hidden_thread() % kRowChunks == 0) {
    const float lse = reinterpret_cast<const float*>(shared + L::kLse)[row];
    auto* sums = reinterpret_cast<float*>(shared + L::kSums);
    sums[row] = tile * kQueries + row < place.queries ? lse * kLog2E : INFINITY;
    sums[kQueries + row] = delta;
  }
}

// The sums of a tile's rows, from what this thread has copied.
template <typename T, int kWarps>
__device__ inline void sum_queries(const Place& place, int tile, unsigned char* shared) {
  constexpr int kRowsAtOnce = kWarps * kWarp / kRowChunks;
  const int thread = hidden_thread(), chunk = thread % kRowChunks;
  const int end = steps_of(place, tile) * kStep;
  for (int row = thread / kRowChunks; row < end; row += kRowsAtOnce) {
    const uint32_t from =
        shared_address(shared) + Layout<kWarps>::tile(tile) + kQueryTile + chunk_offset(row, chunk);
    sum_row<T, kWarps>(place, tile, row, load_shared(from), load_shared(from + kQueryTile), shared);
  }
}

// Copies the only tile of queries while its output is loaded, and sums its rows.
template <typename T, int kWarps>
__device__ inline void copy_and_sum_queries(const Params& p, const Place& place,
                                            unsigned char* shared) {
  constexpr int kRowsAtOnce = kWarps * kWarp / kRowChunks, kRows = kQueries / kRowsAtOnce;
  const int chunk = threadIdx.x % kRowChunks, first = threadIdx.x / kRowChunks;
  const uint32_t base = shared_address(shared),
                 d_outs = base + Layout<kWarps>::tile(0) + kQueryTile;
  uint4 outs[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first + i * kRowsAtOnce;
    outs[i] = make_uint4(0, 0, 0, 0);
    if (row < place.queries)
      outs[i] =
          __ldg(reinterpret_cast<const uint4*>(rows_of<T>(p.out, place.first_query + row, place)) +
                chunk);
  }
  copy_queries<T, kWarps>(p, place, 0, base);
  wait_for_copies();
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first + i * kRowsAtOnce;
    if (i * kRowsAtOnce < steps_of(place, 0) * kStep) // the same for all eight rows of the threads
      sum_row<T, kWarps>(place, 0, row, load_shared(d_outs + chunk_offset(row, chunk)), outs[i],
                         shared);
  }
}

} // namespace
} // namespace dinov2_fast
