// What the backward pass in one kernel has in shared memory, and how it gets there: keys, values,
// and tiles of queries with dO and, for delta = rowsum(dO * O), output.
#pragma once

#include "cuda/attention_backward.cuh"
#include "cuda/attention_resident.cuh"

namespace dinov2_fast {
namespace {

constexpr int kQueries = 64; // of a tile
constexpr int kQueryTile = kQueries * kRowBytes;
constexpr int kWarpTile = kWarpRows * kRowBytes;
constexpr int kLeftBytes = kLeftRows * kRowBytes;
static_assert(kLeftWarps * 8 == kQueries, "a warp has the scores of keys left and 8 queries");
static_assert(kTileColumns == kQueries, "tiles are square");

// One of the sequences and heads that a CTA computes one after the other. Tiles of queries take
// turns in two places. A last one of a single step has its own, so that the first of the next
// problem need not wait for it.
struct Problem : Place {
  int64_t number; // in the launch
  int keys_turn;  // the place of its keys, 0 or 1
  // Tiles that take turns, at least 1, times 2, plus the place of the first: one number to load.
  unsigned turns;

  __device__ Problem(const Place& place, int64_t number, int keys_turn, unsigned tiles_turn)
      : Place(place), number(number), keys_turn(keys_turn),
        turns(max(2, (place.queries + kQueries - kStep - 1) / kQueries * 2) + tiles_turn) {}

  __device__ int tiles_in_turn() const { return static_cast<int>(turns / 2); }
  // Of a tile: 0, 1, or 2 for the last one's own.
  __device__ unsigned turn_of(unsigned tile) const {
    return tile < turns / 2 ? (turns + tile) % 2 : 2;
  }
};

// Queries of a tile, up to whole steps.
__device__ inline int steps_of(const Place& place, int tile) {
  return (min(kQueries, place.queries - tile * kQueries) + kStep - 1) / kStep;
}

// Where things lie in shared memory, in bytes. The gradients of scores are a tile whose rows are
// keys and whose columns are queries. dQ is staged where a tile's output was.
//
// A CTA of 8 warps fills an SM: nothing else computes while it waits, so the next problem arrives
// during this one. Keys take turns in two places. Values stay in registers, and pass through the
// place of the tile that comes second, and one more for two warps.
//
// With one tile of queries there is no place for outputs, the gradients lie where the warp's own
// values were, and dQ is staged where the queries were: four CTAs fit on an SM.
template <int kWarps> struct Layout {
  static constexpr int kKeys = kWarps * kWarpRows;
  static constexpr int kRows = kResidentRows<kWarps>;
  static constexpr bool kOneTile = kRows <= kQueries; // of queries, of which there are no more
  static constexpr int kKeyBytes = kKeys * kRowBytes;
  static constexpr int kTiles = 2 * kKeyBytes; // after keys and values, or two places of keys
  // From queries to dO to output.
  static constexpr int kKindBytes = kOneTile ? kQueryTile : 2 * kQueryTile + kStepBytes;
  static constexpr int kOutputs = kTiles + (kOneTile ? 0 : 2 * kKindBytes);
  static constexpr int kTilesEnd = kTiles + (kOneTile ? 2 : 3) * kKindBytes;
  static constexpr int kPassingWarps = 6;       // a place of 64 rows of each kind
  static constexpr int kLastValues = kTilesEnd; // of the other two
  static constexpr int kScores = kOneTile ? kKeyBytes : kLastValues + 2 * kWarpTile;
  static constexpr int kLeftKeys = kOneTile ? kTilesEnd : kScores + kKeyBytes;
  static constexpr int kLeftValues = kLeftKeys + kLeftBytes;
  static constexpr int kLeftScores = kLeftValues + kLeftBytes;
  static constexpr int kLeftWeights = kLeftScores + kLeftBytes;
  static constexpr int kSums = kHasLeft<kWarps> ? kLeftWeights + kLeftBytes : kLeftKeys;
  static constexpr int kLse = kSums + 2 * kQueries * static_cast<int>(sizeof(float));
  static constexpr int kProblem = // this one and the next
      kLse + (kQueries + (kOneTile ? 0 : kStep)) * static_cast<int>(sizeof(float));
  static constexpr int kBytes = kProblem + 2 * static_cast<int>(sizeof(Problem));

  static __device__ int keys(const Problem& problem) { return problem.keys_turn * kKeyBytes; }

  static __device__ int values(const Problem& problem, int warp) {
    if constexpr (kOneTile)
      return kKeyBytes + warp * kWarpTile;
    const int rows = warp % 2 * kWarpTile;
    return rows + (passes(warp)
                       ? kTiles + (1 - problem.turns % 2) * kQueryTile + warp / 2 * kKindBytes
                       : kLastValues);
  }

  // Whether a warp's values pass through the place of a tile.
  static __device__ bool passes(int warp) { return warp < kPassingWarps; }

  // Where a tile begins, after the first.
  static __device__ int tile(const Problem& problem, int number) {
    return kOneTile ? 0 : problem.turn_of(number) * kQueryTile;
  }
  static __device__ int lse_of(int tile) {
    return kLse + tile / (2 * kQueryTile) * kQueries * static_cast<int>(sizeof(float));
  }
};
static_assert(Layout<kLeftWarps>::kBytes <= 163 * 1024, "what a CTA of an A100 can have");

// Starts copying some of each warp's 32 rows. Zeros fill the last warp's that do not exist.
template <typename T>
__device__ inline void copy_warp_rows(uint32_t to, const T* from, int64_t row_stride, int first,
                                      int end, int count) {
  const int thread = hidden_thread(), lane = thread % kWarp, chunk = lane % kRowChunks;
  count -= thread / kWarp * kWarpRows;
  if (count <= 0)
    return;
  from += thread / kWarp * kWarpRows * row_stride + chunk * (kHeadDim / kRowChunks);
#pragma unroll 1
  for (int row = first + lane / kRowChunks; row < end; row += kWarp / kRowChunks)
    copy_chunk_async(to + chunk_offset(row, chunk), from + row * row_stride, row < count);
}

template <typename T, int kWarps>
__device__ inline void copy_keys(const Params& p, const Problem& problem, int first, int end,
                                 uint32_t shared) {
  copy_warp_rows<T>(shared + Layout<kWarps>::keys(problem) + hidden_thread() / kWarp * kWarpTile,
                    rows_of<T>(p.k, problem.first_key, problem), p.k.row_stride, first, end,
                    problem.keys);
}

template <typename T, int kWarps>
__device__ inline void copy_values(const Params& p, const Problem& problem, uint32_t shared) {
  copy_warp_rows<T>(shared + Layout<kWarps>::values(problem, hidden_thread() / kWarp),
                    rows_of<T>(p.v, problem.first_key, problem), p.v.row_stride, 0, kWarpRows,
                    problem.keys);
}

// Starts copying the keys and values left.
template <typename T>
__device__ inline void copy_left(const Params& p, const Problem& problem, uint32_t shared) {
  using L = Layout<kLeftWarps>;
  if (problem.keys <= L::kKeys)
    return;
  copy_span<T, kLeftWarps>(shared + L::kLeftKeys - L::kKeyBytes,
                           rows_of<T>(p.k, problem.first_key, problem), p.k.row_stride, L::kKeys,
                           L::kRows, problem.keys);
  copy_span<T, kLeftWarps>(shared + L::kLeftValues - L::kKeyBytes,
                           rows_of<T>(p.v, problem.first_key, problem), p.v.row_stride, L::kKeys,
                           L::kRows, problem.keys);
}

// Copies a tile of queries. A thread copies a chunk of a row of each kind, and the thread of a
// row's first chunk lse: what a thread copied it can read without a barrier. A query that does not
// exist is the last once more: its scores are numbers if those are, where 0 times a key may be NaN.
template <typename T, int kWarps>
__device__ inline void copy_queries(const Params& p, const Problem& problem, int tile,
                                    uint32_t shared) {
  constexpr int kRowsAtOnce = kWarps * kWarp / kRowChunks;
  using L = Layout<kWarps>;
  const int thread = hidden_thread();
  const int chunk = thread % kRowChunks, element = chunk * (kHeadDim / kRowChunks);
  const int end = steps_of(problem, tile) * kStep, place = L::tile(problem, tile);
  for (int row = thread / kRowChunks; row < end; row += kRowsAtOnce) {
    const int number = tile * kQueries + row;
    const bool exists = number < problem.queries;
    const int64_t query = problem.first_query + min(number, problem.queries - 1);
    const uint32_t to = shared + L::kTiles + place + chunk_offset(row, chunk);
    copy_chunk_async(to, rows_of<T>(p.q, query, problem) + element, true);
    copy_chunk_async(to + L::kKindBytes, rows_of<T>(p.d_out, query, problem) + element, exists);
    if constexpr (!L::kOneTile)
      copy_chunk_async(to + 2 * L::kKindBytes, rows_of<T>(p.out, query, problem) + element, exists);
    if (chunk == 0)
      copy_float_async(shared + L::lse_of(place) + row * sizeof(float),
                       p.lse + problem.head * p.num_queries + query, exists);
  }
}

// (lse in units of exp2, delta) of a tile's row, from a chunk of dO and output of each of eight
// lanes, and from lse that the first has copied. The weights of a query that does not exist are
// exp2(-inf).
template <typename T, int kWarps>
__device__ inline void sum_row(const Problem& problem, int tile, int place, int row,
                               const uint4& d_out, const uint4& out, unsigned char* shared) {
  using L = Layout<kWarps>;
  float delta = dot<T>(d_out, out);
#pragma unroll
  for (int distance = 1; distance < kRowChunks; distance *= 2)
    delta += __shfl_xor_sync(0xffffffffu, delta, distance);
  if (hidden_thread() % kRowChunks == 0) {
    const float lse = reinterpret_cast<const float*>(shared + L::lse_of(place))[row];
    auto* sums = reinterpret_cast<float*>(shared + L::kSums);
    sums[row] = tile * kQueries + row < problem.queries ? lse * kLog2E : INFINITY;
    sums[kQueries + row] = delta;
  }
}

// The sums of a tile's rows, from what this thread has copied.
template <typename T, int kWarps>
__device__ inline void sum_queries(const Problem& problem, int tile, unsigned char* shared) {
  using L = Layout<kWarps>;
  constexpr int kRowsAtOnce = kWarps * kWarp / kRowChunks;
  const int thread = hidden_thread(), chunk = thread % kRowChunks;
  const int end = steps_of(problem, tile) * kStep, place = L::tile(problem, tile);
  for (int row = thread / kRowChunks; row < end; row += kRowsAtOnce) {
    const uint32_t from =
        shared_address(shared) + L::kTiles + place + L::kKindBytes + chunk_offset(row, chunk);
    sum_row<T, kWarps>(problem, tile, place, row, load_shared(from),
                       load_shared(from + L::kKindBytes), shared);
  }
}

// Copies the only tile of queries while its output is loaded, and sums its rows.
template <typename T, int kWarps>
__device__ inline void copy_and_sum_queries(const Params& p, const Problem& problem,
                                            unsigned char* shared) {
  using L = Layout<kWarps>;
  constexpr int kRowsAtOnce = kWarps * kWarp / kRowChunks, kRows = kQueries / kRowsAtOnce;
  const int chunk = threadIdx.x % kRowChunks, first = threadIdx.x / kRowChunks;
  const uint32_t base = shared_address(shared), d_outs = base + L::kTiles + L::kKindBytes;
  uint4 outs[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first + i * kRowsAtOnce;
    outs[i] = make_uint4(0, 0, 0, 0);
    if (row < problem.queries)
      outs[i] = __ldg(
          reinterpret_cast<const uint4*>(rows_of<T>(p.out, problem.first_query + row, problem)) +
          chunk);
  }
  copy_queries<T, kWarps>(p, problem, 0, base);
  wait_for_copies();
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first + i * kRowsAtOnce;
    if (i * kRowsAtOnce < steps_of(problem, 0) * kStep) // the same for all eight rows of threads
      sum_row<T, kWarps>(problem, 0, 0, row, load_shared(d_outs + chunk_offset(row, chunk)),
                         outs[i], shared);
  }
}

} // namespace
} // namespace dinov2_fast
