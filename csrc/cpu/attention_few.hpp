// Attention of sequences of a few tokens by dot products: a tile of products would be padding for
// the most part, and turning keys across would take longer than multiplying them.
#pragma once

#include "cpu/attention_task.hpp"
#include "cpu/float_products.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace dinov2_fast {

// With AVX2, heads of 64 and data in the cache, dot products are ahead forward to 6 tokens and
// backward to 4.
constexpr int64_t kFewTokens = 4;

inline bool has_few_tokens(const TaskRange& range) {
  return std::max(range.num_queries, range.num_keys) <= kFewTokens;
}

template <int kLanes>
[[gnu::always_inline]] inline float dot(const float* a, const float* b, int64_t width) {
  using Vector = typename VectorOf<kLanes>::type;
  Vector sums{};
  for (int64_t i = 0; i < width; i += kLanes)
    sums += *reinterpret_cast<const Vector*>(a + i) * *reinterpret_cast<const Vector*>(b + i);
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane)
    sum += sums[lane];
  return sum;
}

// The scores of one query, padded with what the keys do not fill.
template <int kLanes>
[[gnu::always_inline]] inline void dots(const float* query, const float* keys, int64_t num_keys,
                                        int64_t width, float padding, float* scores) {
  for (int64_t j = 0; j < num_keys; ++j)
    scores[j] = dot<kLanes>(query, keys + j * width, width);
  for (int64_t j = num_keys; j < round_up(num_keys, kLanes); ++j)
    scores[j] = padding;
}

// to [width] = weights [count] times rows [count, width].
template <int kLanes>
[[gnu::always_inline]] inline void weighted_sum(const float* weights, const float* rows,
                                                int64_t count, int64_t width, float* to) {
  using Vector = typename VectorOf<kLanes>::type;
  for (int64_t i = 0; i < width; i += kLanes) {
    Vector sum{};
    for (int64_t j = 0; j < count; ++j)
      sum += weights[j] * *reinterpret_cast<const Vector*>(rows + j * width + i);
    *reinterpret_cast<Vector*>(to + i) = sum;
  }
}

// rows [count, width] += weights [count] times one row.
template <int kLanes>
[[gnu::always_inline]] inline void add_weighted(const float* weights, const float* row,
                                                int64_t count, int64_t width, float* rows) {
  using Vector = typename VectorOf<kLanes>::type;
  for (int64_t j = 0; j < count; ++j)
    for (int64_t i = 0; i < width; i += kLanes)
      *reinterpret_cast<Vector*>(rows + j * width + i) +=
          weights[j] * *reinterpret_cast<const Vector*>(row + i);
}

template <typename T, int kLanes>
[[gnu::always_inline]] inline void forward_few(const Problem& p, const TaskRange& range,
                                               const TaskRange& next, float* scratch) {
  const auto [head, first_query, num_queries, first_key, num_keys] = range;
  const int64_t width = round_up(p.head_dim, kLanes), columns = round_up(num_keys, kLanes);
  float* keys = scratch; // [keys, width]
  float* values = keys + num_keys * width;
  float* query = values + num_keys * width; // [width]
  float* output = query + width;
  alignas(64) float scores[round_up(kFewTokens, kLanes)];
  unpack<T>(p.k, head, first_key, num_keys, p.head_dim, 1.0f, num_keys, width, keys);
  unpack<T>(p.v, head, first_key, num_keys, p.head_dim, 1.0f, num_keys, width, values);
  float* lse = p.lse + head * p.num_queries + first_query;
  for (int64_t row = 0; row < num_queries; ++row) {
    prefetch_next<T>(p, next, row, false);
    unpack<T>(p.q, head, first_query + row, 1, p.head_dim, p.scale, 1, width, query);
    dots<kLanes>(query, keys, num_keys, width, kNoScore, scores);
    float largest;
    const float sum = exponentials<kLanes>(scores, columns, largest);
    lse[row] = largest + std::log(sum);
    // Before the sum: a value times a weight of at most 1 cannot overflow.
    const float inverse = 1.0f / sum;
    for (int64_t j = 0; j < num_keys; ++j)
      scores[j] *= inverse;
    weighted_sum<kLanes>(scores, values, num_keys, width, output);
    pack<T>(output, width, p.out, head, first_query + row, 1, p.head_dim, 1.0f);
  }
}

template <typename T, int kLanes>
[[gnu::always_inline]] inline void backward_few(const Problem& p, const TaskRange& range,
                                                const TaskRange& next, float* scratch) {
  const auto [head, first_query, num_queries, first_key, num_keys] = range;
  const int64_t width = round_up(p.head_dim, kLanes), columns = round_up(num_keys, kLanes);
  const int64_t floats = num_keys * width;
  float* keys = scratch; // [keys, width]
  float* values = keys + floats;
  float* d_keys = values + floats;
  float* d_values = d_keys + floats;
  float* query = d_values + floats; // [width]
  float* d_output = query + width;
  float* d_query = d_output + width;
  alignas(64) float scores[round_up(kFewTokens, kLanes)], d_scores[round_up(kFewTokens, kLanes)];
  unpack<T>(p.k, head, first_key, num_keys, p.head_dim, 1.0f, num_keys, width, keys);
  unpack<T>(p.v, head, first_key, num_keys, p.head_dim, 1.0f, num_keys, width, values);
  for (int64_t i = 0; i < 2 * floats; ++i)
    d_keys[i] = 0.0f; // and d_values
  for (int64_t row = 0; row < num_queries; ++row) {
    prefetch_next<T>(p, next, row, true);
    unpack<T>(p.q, head, first_query + row, 1, p.head_dim, p.scale, 1, width, query);
    unpack<T>(p.out, head, first_query + row, 1, p.head_dim, 1.0f, 1, width, d_output);
    dots<kLanes>(query, keys, num_keys, width, kNoScore, scores);
    dots<kLanes>(d_output, values, num_keys, width, 0.0f, d_scores);
    scale_row(d_output, width, score_gradients<kLanes>(scores, d_scores, columns));
    weighted_sum<kLanes>(d_scores, keys, num_keys, width, d_query);
    pack<T>(d_query, width, p.d_q, head, first_query + row, 1, p.head_dim, p.scale);
    add_weighted<kLanes>(d_scores, query, num_keys, width, d_keys);
    add_weighted<kLanes>(scores, d_output, num_keys, width, d_values);
  }
  pack<T>(d_keys, width, p.d_k, head, first_key, num_keys, p.head_dim, 1.0f);
  pack<T>(d_values, width, p.d_v, head, first_key, num_keys, p.head_dim, 1.0f);
}

} // namespace dinov2_fast
