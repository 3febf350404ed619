// What attention's kernels share, whatever multiplies: their tasks, and the softmax of one query.
#pragma once

#include "cpu/bf16_products.hpp"
#include "cpu/rows.hpp"
#include "cpu/scalar_math.hpp"

#include <cstdint>
#include <limits>

namespace dinov2_fast {

// Scores of a block of queries should leave room in a core's second cache (1 to 2 MiB).
constexpr int64_t kScoresPerBlock = 96 * 1024;

struct Heads {
  void* data; // [T, H, D]
  int64_t row_stride;
  int64_t head_stride;
};

template <typename T>
[[gnu::always_inline]] inline T* row_of(const Heads& heads, int64_t head, int64_t row) {
  return static_cast<T*>(heads.data) + row * heads.row_stride + head * heads.head_stride;
}

struct Problem {
  Heads q, k, v, out;           // out: of the forward pass; its gradient in the backward pass
  Heads d_q, d_k, d_v;          // backward only
  float* lse;                   // [H, Tq]; forward only
  const int32_t* query_offsets; // [S + 1]
  const int32_t* key_offsets;   // [S + 1]
  float* scratch;               // threads * floats_per_thread; null: of the stack
  int64_t floats_per_thread, num_queries, heads, head_dim;
  float scale;
  MultiplyFunction multiply; // of bf16 matrices; null where products are float
};

// A task is one head of one sequence.
struct TaskRange {
  int64_t head, first_query, num_queries, first_key, num_keys;
};

inline TaskRange range_of(const Problem& p, int64_t task) {
  const int64_t sequence = task / p.heads;
  const int64_t first_query = p.query_offsets[sequence], first_key = p.key_offsets[sequence];
  return {task % p.heads, first_query, p.query_offsets[sequence + 1] - first_query, first_key,
          p.key_offsets[sequence + 1] - first_key};
}

// Asks for rows `i` of the next task, while this one computes: heads lie apart, and a processor
// guesses no row from those before it.
template <typename T>
[[gnu::always_inline]] inline void prefetch_next(const Problem& p, const TaskRange& next, int64_t i,
                                                 bool backward) {
  if (i < next.num_queries) {
    prefetch_row(row_of<const T>(p.q, next.head, next.first_query + i), p.head_dim);
    if (backward)
      prefetch_row(row_of<const T>(p.out, next.head, next.first_query + i), p.head_dim);
  }
  if (i < next.num_keys) {
    prefetch_row(row_of<const T>(p.k, next.head, next.first_key + i), p.head_dim);
    prefetch_row(row_of<const T>(p.v, next.head, next.first_key + i), p.head_dim);
  }
}

// Rows [count, D] times a factor as floats, zeros up to [rows, width].
template <typename T>
[[gnu::always_inline]] inline void unpack(const Heads& from, int64_t head, int64_t first,
                                          int64_t count, int64_t head_dim, float factor,
                                          int64_t rows, int64_t width, float* to) {
  for (int64_t row = 0; row < rows; ++row) {
    float* __restrict out = to + row * width;
    if (row >= count) {
      for (int64_t i = 0; i < width; ++i)
        out[i] = 0.0f;
      continue;
    }
    const T* __restrict in = row_of<T>(from, head, first + row);
#pragma omp simd
    for (int64_t i = 0; i < head_dim; ++i)
      out[i] = load(in[i]) * factor;
    for (int64_t i = head_dim; i < width; ++i)
      out[i] = 0.0f;
  }
}

// Rows [count, width] of floats times a factor to a head's [count, D].
template <typename T>
[[gnu::always_inline]] inline void pack(const float* from, int64_t width, const Heads& to,
                                        int64_t head, int64_t first, int64_t count,
                                        int64_t head_dim, float factor) {
  for (int64_t row = 0; row < count; ++row) {
    const float* __restrict in = from + row * width;
    T* __restrict out = row_of<T>(to, head, first + row);
#pragma omp simd
    for (int64_t i = 0; i < head_dim; ++i)
      store(out[i], in[i] * factor);
  }
}

// Of a column beyond the keys: its weight becomes 0, whatever lse is.
constexpr float kNoScore = -std::numeric_limits<float>::infinity();

[[gnu::always_inline]] inline void leave_out(float* scores, int64_t keys, int64_t columns) {
  for (int64_t j = keys; j < columns; ++j)
    scores[j] = kNoScore;
}

template <int kLanes>
[[gnu::always_inline]] inline float largest_of(const float* scores, int64_t columns) {
  float best[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    best[lane] = kNoScore;
  for (int64_t j = 0; j < columns; j += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane)
      best[lane] = scores[j + lane] > best[lane] ? scores[j + lane] : best[lane];
  }
  float largest = best[0];
  for (int lane = 1; lane < kLanes; ++lane)
    largest = best[lane] > largest ? best[lane] : largest;
  return largest;
}

// Scores of one query to exp(score - largest), in place. Returns the sum.
template <int kLanes>
[[gnu::always_inline]] inline float exponentials(float* scores, int64_t columns, float& largest) {
  float sums[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    sums[lane] = 0.0f;
  largest = largest_of<kLanes>(scores, columns);
  for (int64_t j = 0; j < columns; j += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const float e = exp_normal_or_zero(scores[j + lane] - largest);
      scores[j + lane] = e;
      sums[lane] += e;
    }
  }
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane)
    sum += sums[lane];
  return sum;
}

[[gnu::always_inline]] inline void scale_row(float* __restrict row, int64_t columns, float factor) {
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j)
    row[j] *= factor;
}

// Scores of one query to exp(score - largest), and d_weights to d_scores, in place. Returns what
// makes the former weights: multiplying the query's row of d_outputs by it takes less. The scores
// of all keys are here, so nothing of the forward pass is needed, and no logarithm rounds the
// weights.
template <int kLanes>
[[gnu::always_inline]] inline float score_gradients(float* __restrict scores,
                                                    float* __restrict gradients, int64_t columns) {
  const float largest = largest_of<kLanes>(scores, columns);
  float sums[kLanes], products[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    sums[lane] = products[lane] = 0.0f;
  for (int64_t j = 0; j < columns; j += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const float e = exp_normal_or_zero(scores[j + lane] - largest);
      scores[j + lane] = e;
      sums[lane] += e;
      products[lane] += e * gradients[j + lane];
    }
  }
  float sum = 0.0f, product = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) {
    sum += sums[lane];
    product += products[lane];
  }
  const float inverse = 1.0f / sum, mean = product * inverse;
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j)
    gradients[j] = scores[j] * inverse * (gradients[j] - mean);
  return inverse;
}

} // namespace dinov2_fast
