// The backward pass of short sequences in one kernel: a CTA holds all keys and values of a sequence
// and head, 32 a warp, and queries pass by in tiles of 64. No atomics, no workspace; sums keep
// their order, so every run gives the same bits.
//
// With S^T = K Q^T and dP^T = V dO^T a warp's weights and their gradients are left operands of dV
// and dK as they come out of a product. Gradients of scores go through shared memory once, after
// which dQ of the tile is complete: delta = rowsum(dO * O), dS = P * (dP - delta), dQ = dS K.
//
// 257 = 256 + 1: up to 8 keys past the warps' are "left". Their scores are products of 8 rows, each
// warp's with 8 queries of a tile; their gradients, transposed, belong 16 channels to a warp, which
// costs it 4 registers.
// Source: Dao, "FlashAttention-2", 2023, section 3.1.2.
#pragma once

#include "cuda/attention_resident_queries.cuh"

namespace dinov2_fast {
namespace {

// Of a warp's 32 keys: left operands, and sums over queries.
struct Owned {
  Rows keys, values;
  Sums d_keys, d_values;
};

// 16 queries of a tile: adds to dK and dV of 32 keys, and stores gradients of scores.
template <typename T, int kWarps>
__device__ inline void add_step(Owned& r, uint32_t queries, const float2* sums, uint32_t scores,
                                int step, int keys, float scale_log2) {
  constexpr int kDOuts = Layout<kWarps>::kKindBytes;
  const int thread = hidden_thread(), lane = thread % kWarp;
  const int warp_row = thread / kWarp * kWarpRows;
  const uint32_t along = queries + along_offset(lane);
  const uint32_t across = queries + chunk_offset(lane % 8, lane / 8);
  Scores weights;
  Weights rounded;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    float scores[2][4] = {};
    multiply_eight<T>(scores, r.keys, across + n * 8 * kRowBytes);
    const float2 subtrahends = sums[n * 4 + lane % 4]; // of this lane's two columns
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weights[m][n][i] = exp2_approximate(
            fmaf(scores[m][i], scale_log2, -(i % 2 == 0 ? subtrahends.x : subtrahends.y)));
  }
  if (keys < warp_row + kWarpRows)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (m * kMmaRows + i / 2 * 8 + lane / 4 >= keys - warp_row)
            weights[m][n][i] = 0.0f;
  round_weights<T>(rounded, weights);
  multiply_along<T>(r.d_values, rounded, along + kDOuts);
  const uint32_t gradients_to = scores + warp_row * kRowBytes + chunk_offset(lane / 4, step * 2) +
                                lane % 4 * sizeof(uint32_t);
  // 8 queries at a time: registers are few here.
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    float gradients[2][4] = {};
    multiply_eight<T>(gradients, r.values, across + kDOuts + n * 8 * kRowBytes);
    const float2 subtrahends = sums[kQueries / 2 + n * 4 + lane % 4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* g = gradients[m] + 2 * half;
        const float* w = weights[m][n] + 2 * half;
        const uint32_t bits = pack<T>(w[0] * (g[0] - subtrahends.x), w[1] * (g[1] - subtrahends.y));
        store_shared((gradients_to ^ (n * kChunkBytes)) + (m * kMmaRows + half * 8) * kRowBytes,
                     bits);
        rounded[m][2 * n + half] = bits;
      }
  }
  multiply_along<T>(r.d_keys, rounded, along);
}

// Products of 8 rows with 8 rows, all 64 channels: a lane gets row lane / 4 and two columns.
template <typename T> __device__ inline float2 multiply_eights(uint32_t rows, uint32_t columns) {
  const int lane = hidden_thread() % kWarp;
  const uint32_t offset = chunk_offset(lane % 8, lane / 8);
  float sums[4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a[4], b[4];
    load_matrices(a, (rows + offset) ^ (half * 4 * kChunkBytes));
    load_matrices(b, (columns + offset) ^ (half * 4 * kChunkBytes));
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t upper[4] = {a[2 * k], 0, a[2 * k + 1], 0};
      multiply<T>(sums, upper, b[2 * k], b[2 * k + 1]);
    }
  }
  return make_float2(sums[0], sums[1]);
}

// Weights of the keys left and 8 queries of a tile, and their gradients, to shared memory.
template <typename T>
__device__ inline void score_left(uint32_t shared, uint32_t tile, const float2* sums, int left,
                                  float scale_log2) {
  using L = Layout<kLeftWarps>;
  const int thread = hidden_thread(), lane = thread % kWarp, eight = thread / kWarp;
  const uint32_t query_rows = tile + eight * 8 * kRowBytes;
  const float2 lse2 = sums[eight * 4 + lane % 4];
  const float2 delta = sums[kQueries / 2 + eight * 4 + lane % 4];
  float2 weights = multiply_eights<T>(shared + L::kLeftKeys, query_rows);
  weights.x = exp2_approximate(fmaf(weights.x, scale_log2, -lse2.x));
  weights.y = exp2_approximate(fmaf(weights.y, scale_log2, -lse2.y));
  if (lane / 4 >= left)
    weights = make_float2(0.0f, 0.0f);
  const float2 d = multiply_eights<T>(shared + L::kLeftValues, query_rows + L::kKindBytes);
  const uint32_t offset = chunk_offset(lane / 4, eight) + lane % 4 * sizeof(uint32_t);
  store_shared(shared + L::kLeftWeights + offset, pack<T>(weights.x, weights.y));
  store_shared(shared + L::kLeftScores + offset,
               pack<T>(weights.x * (d.x - delta.x), weights.y * (d.y - delta.y)));
}

// dV^T of the keys left by four warps, dK^T by four, 16 channels each: += a tile of queries.
template <typename T>
__device__ inline void add_left(float (&sums)[4], uint32_t shared, uint32_t tile, int steps) {
  using L = Layout<kLeftWarps>;
  const int thread = hidden_thread(), lane = thread % kWarp, warp = thread / kWarp;
  const bool of_values = warp < kLeftWarps / 2;
  const uint32_t rows = tile + (of_values ? L::kKindBytes : 0) + across_offset(lane);
  const uint32_t columns = shared + (of_values ? L::kLeftWeights : L::kLeftScores) +
                           chunk_offset(lane % 8, lane / 8 % 2);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    uint32_t a[4], b[2];
    load_matrices_transposed(a, (rows ^ (warp % 4 * kMatrixBytes)) + step * kStepBytes);
    load_matrices(b, columns ^ (step * kMatrixBytes));
    multiply<T>(sums, a, b[0], b[1]);
  }
}

// Writes what add_left summed, by way of shared memory.
template <typename T>
__device__ inline void store_left(const Params& p, const Place& place, const float (&sums)[4],
                                  unsigned char* shared, int left) {
  using L = Layout<kLeftWarps>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool of_values = warp < kLeftWarps / 2;
  // [2, 8, 64], in the last tile's own place: the next problem is not there yet
  T* staging = reinterpret_cast<T*>(shared + L::kTiles + 2 * kQueryTile);
  const float factor = of_values ? 1.0f : p.scale;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int key = lane % 4 * 2 + i % 2, channel = warp % 4 * kMmaRows + i / 2 * 8 + lane / 4;
    from_float(staging[((of_values ? 0 : 1) * kLeftRows + key) * kHeadDim + channel],
               sums[i] * factor);
  }
  __syncthreads();
  const int row = threadIdx.x / kRowChunks, key = row % kLeftRows, chunk = lane % kRowChunks;
  if (row >= 2 * kLeftRows || key >= left)
    return;
  const Heads& to = row < kLeftRows ? p.d_v : p.d_k;
  T* rows = rows_of<T>(to, place.first_key + L::kKeys + key, place);
  __stwb(reinterpret_cast<uint4*>(rows) + chunk,
         reinterpret_cast<const uint4*>(staging)[row * kRowChunks + chunk]);
}

// Writes 32 rows of 16 channels times a factor by way of shared memory that no other warp uses, and
// that no lane reads any more: rows of two 16-byte vectors, 16 rows with a step between. Vectors
// are exchanged every four rows, so that neither side has bank conflicts.
template <typename T>
__device__ inline void store_block(T* to, int64_t row_stride, int count,
                                   const float (&sums)[2][2][4], float factor,
                                   unsigned char* staging) {
  const int lane = hidden_thread() % kWarp;
  const auto offset = [](int m, int row, int chunk) {
    return m * kStepBytes + (row * 2 + (chunk ^ (row >> 2 & 1))) * kChunkBytes;
  };
#pragma unroll
  for (int m = 0; m < 2; ++m)
    if (m * kMmaRows < count)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<uint32_t*>(staging + offset(m, half * 8 + lane / 4, n) + lane % 4 * 4) =
              pack<T>(sums[m][n][2 * half] * factor, sums[m][n][2 * half + 1] * factor);
  __syncwarp();
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const int row = m * kMmaRows + lane / 2, chunk = lane % 2;
    if (row < count)
      __stwb(reinterpret_cast<uint4*>(to + row * row_stride) + chunk,
             *reinterpret_cast<const uint4*>(staging + offset(m, lane / 2, chunk)));
  }
}

// atomicAdd on an address of an unknown space returns the old value, which costs a register.
__device__ inline void add_in_any_order(float* to, float x) {
  asm volatile("red.global.add.f32 [%0], %1;\n" ::"l"(__cvta_generic_to_global(to)), "f"(x)
               : "memory");
}

// Adds 32 rows of 16 channels to sums in memory, to which other CTAs add as well: in any order.
__device__ inline void add_block(float* to, int row_stride, int count,
                                 const float (&sums)[2][2][4]) {
  const int lane = hidden_thread() % kWarp;
  to += lane / 4 * row_stride + lane % 4 * 2;
#pragma unroll
  for (int eight = 0; eight < kWarpRows / 8; ++eight) {
    if (eight * 8 + lane / 4 < count)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          add_in_any_order(to + n * 8 + i, sums[eight / 2][n][eight % 2 * 2 + i]);
    to += 8 * row_stride;
    asm volatile("" : "+l"(to)); // one address at a time: registers are few
  }
}

// dQ of 32 queries of a tile and some of the channels: all keys are in shared memory. Where they
// are a part of the sequence's, dQ is added to.
template <typename T, int kWarps, bool kPart>
__device__ inline void store_d_queries(const Params& p, const Problem& problem, int tile,
                                       unsigned char* shared) {
  using L = Layout<kWarps>;
  constexpr int kParts = kWarps / 2;                    // of the channels, by a warp each
  constexpr int kBlocks = kHeadDim / kParts / kMmaRows; // of 16 channels, of a warp
  const int thread = hidden_thread(), lane = thread % kWarp, warp = thread / kWarp;
  const int half = warp % 2, count = problem.queries - tile * kQueries - half * kWarpRows;
  if (count <= 0)
    return;
  const uint32_t base = shared_address(shared);
  const int steps = (min(problem.keys, L::kKeys) + kStep - 1) / kStep;
  const int chunk = half * 4 + lane / 8 % 2; // of the first 16 queries
#pragma unroll 1
  for (int block = warp / 2 * kBlocks; block < (warp / 2 + 1) * kBlocks; ++block) {
    float sums[2][2][4] = {};
    uint32_t a_address = base + L::kScores + chunk_offset(lane % 8 + lane / 16 * 8, chunk);
    uint32_t b_address = (base + L::keys(problem) + along_offset(lane)) ^ (block * kMatrixBytes);
#pragma unroll 2
    for (int step = 0; step < steps; ++step) {
      uint32_t b[4];
      load_matrices_transposed(b, b_address);
#pragma unroll
      for (int m = 0; m < 2; ++m)
        if (m * kMmaRows < count) {
          uint32_t a[4];
          load_matrices_transposed(a, a_address ^ (m * kMatrixBytes));
          multiply<T>(sums[m][0], a, b[0], b[1]);
          multiply<T>(sums[m][1], a, b[2], b[3]);
        }
      a_address += kStepBytes;
      b_address += kStepBytes;
    }
    if constexpr (kHasLeft<kWarps> && !kPart)
      if (problem.keys > L::kKeys) {
        uint32_t b[2];
        const int row = lane % 8, matrix = lane / 8 % 2;
        load_matrices_transposed(b, base + L::kLeftKeys + chunk_offset(row, block * 2 + matrix));
#pragma unroll
        for (int m = 0; m < 2; ++m)
          if (m * kMmaRows < count) {
            uint32_t a[2];
            load_matrices_transposed(a, (base + L::kLeftScores + chunk_offset(row, chunk)) ^
                                            (m * kMatrixBytes));
            const uint32_t left_half[4] = {a[0], a[1], 0, 0};
            multiply<T>(sums[m][0], left_half, b[0], 0);
            multiply<T>(sums[m][1], left_half, b[1], 0);
          }
      }
    const int64_t query = problem.first_query + tile * kQueries + half * kWarpRows;
    if constexpr (kPart)
      add_block(d_q_sums_of(p, query, problem) + block * kMmaRows, p.num_heads * kHeadDim, count,
                sums);
    else
      store_block<T>(rows_of<T>(p.d_q, query, problem) + block * kMmaRows, p.d_q.row_stride, count,
                     sums, p.scale,
                     shared + L::kOutputs + L::tile(problem, tile) + half * kWarpTile +
                         block * (kMmaRows * kMatrixBytes));
  }
}

template <int kWarps>
constexpr int kResidentCtas = kHasLeft<kWarps> ? 1 : 4; // of an SM, by their registers

// What a CTA computes first; with kPart a block of a longer sequence's keys.
template <bool kPart> __device__ inline Problem first_problem(const Params& p) {
  Place place = place_of(p, blockIdx.x);
  if constexpr (kPart) {
    const int first = place.block * Layout<kLeftWarps>::kKeys;
    place.first_key += first;
    place.keys = min(place.keys - first, Layout<kLeftWarps>::kKeys);
  }
  return {place, blockIdx.x, 0, 0};
}

// What it computes next, without rows if that is nothing.
__device__ inline Problem problem_after(const Params& p, const Problem& problem) {
  const int64_t number = problem.number + gridDim.x;
  const Place place = number < p.num_problems ? place_of(p, number) : Place{};
  return {place, number, 1 - problem.keys_turn, (problem.turns + problem.tiles_in_turn()) % 2};
}

// At the beginning of a tile: some of the next problem's keys, and its first tile as soon as there
// is a place for it.
template <typename T>
__device__ inline void copy_ahead(const Params& p, const Problem& problem, const Problem& next,
                                  int tile, uint32_t shared) {
  constexpr int kRows = kWarpRows / (Layout<kLeftWarps>::kKeys / kQueries); // of a warp and tile
  const int last = problem.tiles_in_turn() - 1;
  if (tile > last)
    return;
  copy_keys<T, kLeftWarps>(p, next, tile * kRows, tile < last ? (tile + 1) * kRows : kWarpRows,
                           shared);
  if (tile == last) {
    copy_queries<T, kLeftWarps>(p, next, 0, shared);
    if (!Layout<kLeftWarps>::passes(hidden_thread() / kWarp))
      copy_values<T, kLeftWarps>(p, next, shared);
  }
}

// All gradients of a sequence and head. With 8 warps a CTA computes one after another, each of
// which arrives while the one before is computed.
template <typename T, int kWarps, bool kPart>
__global__ void __launch_bounds__(kWarps* kWarp, kResidentCtas<kWarps>)
    attention_backward_resident_kernel(const Params p) {
  using L = Layout<kWarps>;
  constexpr bool kMany = kHasLeft<kWarps> && !kPart; // problems of a CTA; they can have keys left
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  // Kept in shared memory: sums need the registers.
  Problem& problem = *reinterpret_cast<Problem*>(shared + L::kProblem);
  Problem& next = *(&problem + (kMany ? 1 : 0));
  Problem after({}, 0, 0, 0);
  {
    const Problem first = first_problem<kPart>(p);
    if (first.keys <= 0 && kPart)
      return;
    if constexpr (kMany)
      after = problem_after(p, first);
    if (threadIdx.x == 0)
      next = first;
    copy_keys<T, kWarps>(p, first, 0, kWarpRows, base);
    copy_values<T, kWarps>(p, first, base);
    if constexpr (kMany)
      copy_left<T>(p, first, base);
    if constexpr (L::kOneTile)
      copy_and_sum_queries<T, kWarps>(p, first, shared);
    else
      copy_queries<T, kWarps>(p, first, 0, base);
  }
  __syncthreads();

  const auto warp_row = [] { return hidden_thread() / kWarp * kWarpRows; };
  const auto count_of_warp = [&] { return min(kWarpRows, problem.keys - warp_row()); };
  const auto* sums = reinterpret_cast<const float2*>(shared + L::kSums); // lse2, then delta
  Owned r;
  do {
    if constexpr (!L::kOneTile) {
      wait_for_copies();
      __syncwarp(); // a warp's own keys and values are here
      sum_queries<T, kWarps>(next, 0, shared);
    }
    if (next.keys > warp_row()) {
      load_rows(r.keys, base + L::keys(next) + hidden_thread() / kWarp * kWarpTile, along_offset());
      load_rows(r.values, base + L::values(next, hidden_thread() / kWarp), along_offset());
    }
    if constexpr (!L::kOneTile)
      __syncthreads(); // all is here, and where values passed through is free
    if constexpr (kMany) {
      if (threadIdx.x == 0) {
        problem = next;
        next = after;
      }
      __syncthreads();
    }
    float left_sums[4] = {};
    clear(r.d_keys);
    clear(r.d_values);
    int tile = 0;
#pragma unroll 1
    do { // at least once: the next problem is copied, too, where this one has no queries
      const auto more = [&] { return !L::kOneTile && (tile + 1) * kQueries < problem.queries; };
      if (more())
        copy_queries<T, kWarps>(p, problem, tile + 1, base);
      if constexpr (kMany)
        copy_ahead<T>(p, problem, next, tile, base);
      const auto queries = [&] { return base + L::kTiles + L::tile(problem, tile); };
      // The number of the tile waits in shared memory: with it the steps would spill on sm_90.
      static_assert(!kPart || kWarps * kWarp * sizeof(int) <= kLeftBytes, "a number a thread");
      const auto number = [&]()->volatile int& {
        return reinterpret_cast<volatile int*>(shared + L::kLeftScores)[hidden_thread()];
      };
      if constexpr (kPart)
        number() = tile;
      if (count_of_warp() > 0) {
        const uint32_t first = queries();
#pragma unroll 1
        for (int step = 0; step < steps_of(problem, tile); ++step)
          add_step<T, kWarps>(r, first + step * kStepBytes, sums + step * 8, base + L::kScores,
                              step, problem.keys, p.scale_log2);
      }
      if constexpr (kPart)
        tile = number();
      if constexpr (kMany)
        if (problem.keys > L::kKeys && hidden_thread() / kWarp < 2 * steps_of(problem, tile))
          score_left<T>(base, queries(), sums, problem.keys - L::kKeys, p.scale_log2);
      __syncthreads(); // gradients of scores are here
      if constexpr (kMany)
        if (problem.keys > L::kKeys)
          add_left<T>(left_sums, base, queries(), steps_of(problem, tile));
      store_d_queries<T, kWarps, kPart>(p, problem, tile, shared);
      if (more()) {
        wait_for_copies();
        sum_queries<T, kWarps>(problem, tile + 1, shared);
      }
      __syncthreads(); // the next tile is here, and nobody reads gradients any more
      ++tile;
      if constexpr (kMany)
        if (tile == problem.tiles_in_turn() && L::passes(hidden_thread() / kWarp))
          copy_values<T, kWarps>(p, next, base);
    } while (!L::kOneTile && tile * kQueries < problem.queries);
    if constexpr (kMany) {
      copy_left<T>(p, next, base);
      after = problem_after(p, next); // arrives while rows are stored
      if (problem.keys > L::kKeys)
        store_left<T>(p, problem, left_sums, shared, problem.keys - L::kKeys);
    }
    const int first = warp_row(), count = count_of_warp();
    if (count > 0) {
      unsigned char* staging = shared + L::kScores + first * kRowBytes;
      store_rows(rows_of<T>(p.d_v, problem.first_key + first, problem), p.d_v.row_stride, count,
                 r.d_values, 1.0f, staging);
      __syncwarp(); // the staging is written again
      store_rows(rows_of<T>(p.d_k, problem.first_key + first, problem), p.d_k.row_stride, count,
                 r.d_keys, p.scale, staging);
    }
  } while (kMany && next.number < p.num_problems);
}

} // namespace
} // namespace dinov2_fast
