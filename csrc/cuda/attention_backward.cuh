// The backward pass without atomics: one kernel sums over keys for each query, one over queries for
// each key and value. Sums keep their order, so every run gives the same bits.
//
// With weights P = exp2(S * scale_log2 - lse2), dP = dO V^T and delta = rowsum(dO * O):
// dS = P * (dP - delta), dQ = dS K * scale, dK = dS^T Q * scale, dV = P^T dO.
// Source: Dao, "FlashAttention-2", 2023, section 3.1.2.
#pragma once

#include "cuda/attention_tiles.cuh"

namespace dinov2_fast {
namespace {

template <typename T> __device__ inline float dot(const uint4& left, const uint4& right) {
  Vector<T, 8> a, b;
  memcpy(&a, &left, sizeof(left));
  memcpy(&b, &right, sizeof(right));
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    sum = fmaf(to_float(a.at[i]), to_float(b.at[i]), sum);
  return sum;
}

// Delta of a warp's rows, eight lanes a row, into `sums` and into memory.
template <typename T>
__device__ inline void sum_products(const T* out_rows, int64_t row_stride,
                                    const unsigned char* d_out_rows, int count, float* sums,
                                    float* memory) {
  const int lane = threadIdx.x % kWarp, chunk = lane % kRowChunks;
#pragma unroll
  for (int i = 0; i < kWarpRows / 4; ++i) {
    const int row = i * 4 + lane / kRowChunks;
    uint4 out = make_uint4(0, 0, 0, 0);
    if (row < count)
      out = __ldg(reinterpret_cast<const uint4*>(out_rows + row * row_stride) + chunk);
    const auto* d_out = reinterpret_cast<const uint4*>(d_out_rows + chunk_offset(row, chunk));
    float sum = dot<T>(out, *d_out);
#pragma unroll
    for (int distance = 1; distance < kRowChunks; distance *= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (chunk == 0) {
      sums[row] = sum;
      if (row < count)
        memory[row] = sum;
    }
  }
}

template <int kWarps> constexpr int queries_shared_bytes(bool one_tile) {
  constexpr int kFloatBytes = static_cast<int>(sizeof(float));
  return kWarps * kWarpRows * (2 * kRowBytes + kFloatBytes) + columns_bytes(one_tile);
}

// dQ of 32 queries += one tile of keys.
template <typename T>
__device__ inline void add_keys(Sums& d_queries, const Rows& queries, const Rows& d_outs,
                                uint32_t tile, int keys, float scale_log2,
                                const float (&lse2)[2][2], const float (&delta)[2][2]) {
  const uint32_t across = tile + across_offset(), along = tile + along_offset();
#pragma unroll 1
  for (int begin = 0; begin < keys; begin += kStep) {
    const uint32_t step = begin * kRowBytes;
    Scores scores, gradients;
    multiply_across<T>(scores, queries, across + step);
    multiply_across<T>(gradients, d_outs, across + kTileBytes + step);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float score = fmaf(scores[m][n][i], scale_log2, -lse2[m][i / 2]);
          gradients[m][n][i] = exp2_approximate(score) * (gradients[m][n][i] - delta[m][i / 2]);
        }
    if (keys < begin + kStep)
      mask(gradients, keys - begin, 0.0f);
    Weights weights;
    round_weights<T>(weights, gradients);
    multiply_along<T>(d_queries, weights, along + step);
  }
}

// dQ of 32 queries a warp, and delta for the kernel of keys.
template <typename T, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp) attention_backward_queries_kernel(const Params p) {
  constexpr int kThreads = kWarps * kWarp, kRows = kWarps * kWarpRows;
  extern __shared__ __align__(1024) unsigned char shared[];
  const Place place = place_of(p);
  const int first = place.block * kRows;
  if (first >= place.queries)
    return;
  const int64_t first_query = place.first_query + first;
  const int rows = min(kRows, place.queries - first);
  unsigned char* d_out_tile = shared + kRows * kRowBytes;
  auto* sums = reinterpret_cast<float*>(d_out_tile + kRows * kRowBytes); // [kRows]
  const uint32_t query_rows = shared_address(shared), d_out_rows = shared_address(d_out_tile);
  copy_rows<T, kRows, kThreads, kWarpRows>(query_rows, rows_of<T>(p.q, first_query, place),
                                           p.q.row_stride, rows);
  copy_rows<T, kRows, kThreads, kWarpRows>(d_out_rows, rows_of<T>(p.d_out, first_query, place),
                                           p.d_out.row_stride, rows);
  const auto columns =
      columns_of<T>(p.k, p.v, place.first_key, place.keys, place, shared_address(sums + kRows));
  const auto copy = [&](int tile) { columns.template copy<kThreads>(tile); };
  copy(0);

  const int lane = threadIdx.x % kWarp, warp_row = threadIdx.x / kWarp * kWarpRows;
  const int count = rows - warp_row;
  const int64_t sum_row = place.head * p.num_queries + first_query + warp_row;
  Rows queries, d_outs;
  Sums d_queries;
  float lse2[2][2], delta[2][2];
  const auto prepare = [&] {
    if (count <= 0)
      return;
    sum_products<T>(rows_of<T>(p.out, first_query + warp_row, place), p.out.row_stride,
                    d_out_tile + warp_row * kRowBytes, count, sums + warp_row, p.delta + sum_row);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i * 8 + lane / 4;
      lse2[i / 2][i % 2] = row < count ? p.lse[sum_row + row] * kLog2E : 0.0f;
      delta[i / 2][i % 2] = sums[warp_row + row];
    }
    load_rows(queries, query_rows + warp_row * kRowBytes, along_offset());
    load_rows(d_outs, d_out_rows + warp_row * kRowBytes, along_offset());
    clear(d_queries);
  };
  for_each_tile(columns.num_tiles(), copy, prepare, [&](int tile) {
    if (count > 0)
      add_keys<T>(d_queries, queries, d_outs, columns.place(tile), columns.count_of(tile),
                  p.scale_log2, lse2, delta);
  });
  if (count > 0)
    store_rows(rows_of<T>(p.d_q, first_query + warp_row, place), p.d_q.row_stride, count, d_queries,
               p.scale, shared + warp_row * kRowBytes);
}

// A row of dQ / scale in float32.
__device__ inline float* d_q_sums_of(const Params& p, int64_t query, const Place& place) {
  return p.d_q_sums + (query * p.num_heads + place.head) * kHeadDim;
}

// dQ out of its sums.
template <typename T, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp)
    attention_backward_round_queries_kernel(const Params p) {
  constexpr int kRowsAtOnce = kWarps * kWarp / kRowChunks, kRows = kWarps * kWarpRows;
  constexpr int kElements = kHeadDim / kRowChunks;
  const Place place = place_of(p);
  const int first = place.block * kRows, element = threadIdx.x % kRowChunks * kElements;
  const int end = min(first + kRows, place.queries);
  for (int row = first + threadIdx.x / kRowChunks; row < end; row += kRowsAtOnce) {
    const int64_t query = place.first_query + row;
    const float* sums = d_q_sums_of(p, query, place) + element;
    Vector<T, kElements> rounded;
#pragma unroll
    for (int half = 0; half < kElements; half += 4) {
      const auto four = load_vector<float, 4>(sums + half);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        from_float(rounded.at[half + i], four.at[i] * p.scale);
    }
    store_vector(rows_of<T>(p.d_q, query, place) + element, rounded);
  }
}

// lse and delta of a tile of queries, beside the tile.
constexpr int kSumsBytes = 2 * kColumns * static_cast<int>(sizeof(float));

template <int kThreads, int kWhole>
__device__ inline void copy_sums(uint32_t to, const float* lse, const float* delta, int count) {
  const int end = (count + kWhole - 1) / kWhole * kWhole;
  for (int column = threadIdx.x; column < end; column += kThreads) {
    copy_float_async(to + column * sizeof(float), lse + column, column < count);
    copy_float_async(to + (kColumns + column) * sizeof(float), delta + column, column < count);
  }
}

// Of a warp's 32 keys: left operands, and sums over queries.
struct Keys {
  Rows keys, values;
  Sums d_keys, d_values;
};

// dK, dV of 32 keys += 16 queries.
template <typename T>
__device__ inline void add_queries(Keys& r, uint32_t tile, const float* sums, int begin,
                                   int queries, float scale_log2) {
  const uint32_t step = begin * kRowBytes;
  const uint32_t across = tile + across_offset() + step, along = tile + along_offset() + step;
  const int column = threadIdx.x % 4 * 2;
  Scores scores, gradients;
  multiply_across<T>(scores, r.keys, across);
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float lse2 = sums[begin + n * 8 + column + i] * kLog2E;
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 4; half += 2)
          scores[m][n][half + i] =
              exp2_approximate(fmaf(scores[m][n][half + i], scale_log2, -lse2));
    }
  if (queries < begin + kStep)
    mask(scores, queries - begin, 0.0f);
  Weights weights;
  round_weights<T>(weights, scores);
  multiply_along<T>(r.d_values, weights, along + kTileBytes);
  multiply_across<T>(gradients, r.values, across + kTileBytes);
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float delta = sums[kColumns + begin + n * 8 + column + i];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 4; half += 2)
          gradients[m][n][half + i] = scores[m][n][half + i] * (gradients[m][n][half + i] - delta);
    }
  if (queries < begin + kStep)
    mask(gradients, queries - begin, 0.0f);
  round_weights<T>(weights, gradients);
  multiply_along<T>(r.d_keys, weights, along);
}

template <int kWarps> constexpr int keys_shared_bytes(bool one_tile) {
  return kWarps * kWarpRows * 2 * kRowBytes + (one_tile ? 1 : 2) * kSumsBytes +
         columns_bytes(one_tile);
}

// dK and dV of 32 keys a warp.
template <typename T, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp) attention_backward_keys_kernel(const Params p) {
  constexpr int kThreads = kWarps * kWarp, kRows = kWarps * kWarpRows;
  extern __shared__ __align__(1024) unsigned char shared[];
  const Place place = place_of(p);
  const int first = place.block * kRows;
  if (first >= place.keys)
    return;
  const int64_t first_key = place.first_key + first;
  const int rows = min(kRows, place.keys - first);
  const int64_t sum_row = place.head * p.num_queries + place.first_query;
  const uint32_t key_rows = shared_address(shared), value_rows = key_rows + kRows * kRowBytes;
  const bool one_tile = place.queries <= kColumns;
  unsigned char* sums = shared + 2 * kRows * kRowBytes;
  copy_rows<T, kRows, kThreads, kWarpRows>(key_rows, rows_of<T>(p.k, first_key, place),
                                           p.k.row_stride, rows);
  copy_rows<T, kRows, kThreads, kWarpRows>(value_rows, rows_of<T>(p.v, first_key, place),
                                           p.v.row_stride, rows);
  const auto columns = columns_of<T>(p.q, p.d_out, place.first_query, place.queries, place,
                                     shared_address(sums + (one_tile ? 1 : 2) * kSumsBytes));
  const auto copy = [&](int tile) {
    columns.template copy<kThreads>(tile);
    const int64_t row = sum_row + static_cast<int64_t>(tile) * kColumns;
    copy_sums<kThreads, kStep>(shared_address(sums + tile % 2 * kSumsBytes), p.lse + row,
                               p.delta + row, columns.count_of(tile));
  };
  copy(0);

  const int warp_row = threadIdx.x / kWarp * kWarpRows, count = rows - warp_row;
  Keys r;
  const auto prepare = [&] {
    if (count <= 0)
      return;
    load_rows(r.keys, key_rows + warp_row * kRowBytes, along_offset());
    load_rows(r.values, value_rows + warp_row * kRowBytes, along_offset());
    clear(r.d_keys);
    clear(r.d_values);
  };
  for_each_tile(columns.num_tiles(), copy, prepare, [&](int tile) {
    const auto* tile_sums = reinterpret_cast<const float*>(sums + tile % 2 * kSumsBytes);
    const int queries = count > 0 ? columns.count_of(tile) : 0;
#pragma unroll 1
    for (int begin = 0; begin < queries; begin += kStep)
      add_queries<T>(r, columns.place(tile), tile_sums, begin, queries, p.scale_log2);
  });
  if (count <= 0)
    return;
  unsigned char* staging = shared + warp_row * kRowBytes;
  store_rows(rows_of<T>(p.d_v, first_key + warp_row, place), p.d_v.row_stride, count, r.d_values,
             1.0f, staging);
  __syncwarp(); // the staging is written again
  store_rows(rows_of<T>(p.d_k, first_key + warp_row, place), p.d_k.row_stride, count, r.d_keys,
             p.scale, staging);
}

} // namespace
} // namespace dinov2_fast
