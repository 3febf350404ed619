// Attention of bf16 tensors by products of bf16 matrices: scores, sums and gradients are float, and
// what goes into a product is bf16, so weights and gradients of scores are rounded once before it.
//
// "Rows" below are an operand A of bf16_products.hpp, "pairs" an operand B. Where
// a product sums over queries, its result is computed across, [D, keys]: weights and gradients of
// scores are then pairs, which two neighbouring queries make, and nothing large is transposed.
#pragma once

#include "cpu/attention_task.hpp"
#include "cpu/bf16_products.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace dinov2_fast {

// Queries that pass over the keys together. Forward, their scores stay in the first cache;
// backward, where each block reads and writes the gradients of all keys, a whole 224 px crop is one
// block.
constexpr int64_t kForwardBlockRows = 2 * kTile, kBackwardBlockRows = 288;

struct PairSizes {
  int64_t key_columns, key_depth;     // keys in whole tiles, as columns of C and as terms of a sum
  int64_t width_columns, width_depth; // D likewise
  int64_t block_rows;                 // queries likewise, fit for both
};

inline PairSizes pair_sizes(int64_t block_rows, int64_t keys, int64_t head_dim) {
  return {round_up(keys, kTile), round_up(keys, kTileDepth), round_up(head_dim, kTile),
          round_up(head_dim, kTileDepth), block_rows};
}

inline int64_t backward_block_rows(int64_t queries, int64_t keys) {
  const int64_t fitting = kScoresPerBlock / std::max(round_up(keys, kTile), kTile);
  const int64_t whole = std::max(fitting / kTileDepth * kTileDepth, kTileDepth);
  return std::min({whole, kBackwardBlockRows, round_up(std::max<int64_t>(queries, 1), kTileDepth)});
}

// Parts of a thread's scratch, handed out one after the other, each on a line of the cache.
class Scratch {
public:
  explicit Scratch(float* memory) : memory_(memory) {}
  float* floats(int64_t count) {
    float* part = memory_ == nullptr ? nullptr : memory_ + taken_; // null: only counts
    taken_ += round_up(count, 16);
    return part;
  }
  bfloat16* halves(int64_t count) {
    return reinterpret_cast<bfloat16*>(floats(round_up(count, 2) / 2));
  }
  int64_t floats_taken() const { return taken_; }

private:
  float* memory_;
  int64_t taken_ = 0;
};

struct ForwardParts {
  bfloat16 *keys, *values, *queries, *weights;
  float *scores, *outputs;
};

inline ForwardParts forward_parts(const PairSizes& s, Scratch& scratch) {
  ForwardParts p;
  p.keys = scratch.halves(s.key_columns * s.width_depth);
  p.values = scratch.halves(s.key_depth * s.width_columns);
  p.queries = scratch.halves(s.block_rows * s.width_depth);
  p.weights = scratch.halves(s.block_rows * s.key_depth);
  p.scores = scratch.floats(s.block_rows * s.key_columns);
  p.outputs = scratch.floats(s.block_rows * s.width_columns);
  return p;
}

struct BackwardParts {
  bfloat16 *keys_across, *values_across, *keys; // pairs
  bfloat16 *queries, *d_outputs;                // rows
  bfloat16 *queries_across, *d_outputs_across;  // rows, [D, queries]
  bfloat16 *weight_pairs, *d_score_pairs;       // [queries, keys]
  bfloat16* d_score_rows;
  float *scores, *d_scores, *d_queries;
  float *d_keys_across, *d_values_across; // [D, keys]
};

inline BackwardParts backward_parts(const PairSizes& s, Scratch& scratch) {
  BackwardParts p;
  for (bfloat16** pairs : {&p.keys_across, &p.values_across})
    *pairs = scratch.halves(s.key_columns * s.width_depth);
  p.keys = scratch.halves(s.key_depth * s.width_columns);
  for (bfloat16** rows : {&p.queries, &p.d_outputs})
    *rows = scratch.halves(s.block_rows * s.width_depth);
  for (bfloat16** rows : {&p.queries_across, &p.d_outputs_across})
    *rows = scratch.halves(s.width_columns * s.block_rows);
  for (bfloat16** pairs : {&p.weight_pairs, &p.d_score_pairs})
    *pairs = scratch.halves(s.block_rows * s.key_columns);
  p.d_score_rows = scratch.halves(s.block_rows * s.key_depth);
  for (float** scores : {&p.scores, &p.d_scores})
    *scores = scratch.floats(s.block_rows * s.key_columns);
  p.d_queries = scratch.floats(s.block_rows * s.width_columns);
  for (float** gradients : {&p.d_keys_across, &p.d_values_across})
    *gradients = scratch.floats(s.width_columns * s.key_columns);
  return p;
}

// Enough for every sequence of at most these lengths: blocks of each size with the most keys that
// leave room for them.
inline int64_t pair_scratch_floats(int64_t max_queries, int64_t max_keys, int64_t head_dim,
                                   bool backward) {
  int64_t most = 0;
  const auto take = [&](int64_t rows, int64_t keys) {
    Scratch scratch(nullptr);
    const PairSizes s = pair_sizes(rows, keys, head_dim);
    if (backward)
      backward_parts(s, scratch);
    else
      forward_parts(s, scratch);
    most = std::max(most, scratch.floats_taken());
  };
  take(kForwardBlockRows, max_keys);
  for (int64_t rows = 2 * kTileDepth; backward && rows <= backward_block_rows(max_queries, 0);
       rows += kTileDepth)
    take(rows, std::min(max_keys, kScoresPerBlock / rows));
  return most;
}

// Rows [count, D] with zeros up to [rows, width].
[[gnu::always_inline]] inline void copy_rows(const Heads& from, int64_t head, int64_t first,
                                             int64_t count, int64_t head_dim, int64_t rows,
                                             int64_t width, bfloat16* to) {
  for (int64_t row = 0; row < rows; ++row, to += width) {
    const int64_t filled = row < count ? head_dim : 0;
    std::memcpy(to, row_of<const bfloat16>(from, head, first + row), filled * sizeof(bfloat16));
    std::memset(to + filled, 0, (width - filled) * sizeof(bfloat16));
  }
}

// The same across, [width, rows].
[[gnu::always_inline]] inline void copy_across(const Heads& from, int64_t head, int64_t first,
                                               int64_t count, int64_t head_dim, int64_t rows,
                                               int64_t width, bfloat16* to) {
  std::memset(to, 0, width * rows * sizeof(bfloat16));
  for (int64_t row = 0; row < count; ++row) {
    const bfloat16* in = row_of<const bfloat16>(from, head, first + row);
    for (int64_t i = 0; i < head_dim; ++i)
      to[i * rows + row] = in[i];
  }
}

// Pairs of neighbouring channels, a column each token: [columns / 16, depth / 2, 16, 2].
[[gnu::always_inline]] inline void pair_channels(const Heads& from, int64_t head, int64_t first,
                                                 int64_t count, int64_t head_dim, int64_t columns,
                                                 int64_t depth, bfloat16* to) {
  std::memset(to, 0, columns * depth * sizeof(bfloat16));
  for (int64_t token = 0; token < count; ++token) {
    const bfloat16* in = row_of<const bfloat16>(from, head, first + token);
    bfloat16* out = to + token / kTile * kTile * depth + token % kTile * 2;
    for (int64_t i = 0; i + 1 < head_dim; i += 2)
      std::memcpy(out + i * kTile, in + i, 2 * sizeof(bfloat16));
    if (head_dim % 2 != 0)
      out[(head_dim - 1) * kTile] = in[head_dim - 1];
  }
}

// Two bf16 as they lie side by side in memory.
[[gnu::always_inline]] inline uint32_t side_by_side(const bfloat16& one, const bfloat16& next) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  return one.bits | static_cast<uint32_t>(next.bits) << 16;
#else
  return next.bits | static_cast<uint32_t>(one.bits) << 16;
#endif
}

// Pairs of neighbouring tokens, a column each channel: [columns / 16, depth / 2, 16, 2].
[[gnu::always_inline]] inline void pair_tokens(const Heads& from, int64_t head, int64_t first,
                                               int64_t count, int64_t head_dim, int64_t columns,
                                               int64_t depth, bfloat16* to) {
  std::memset(to, 0, columns * depth * sizeof(bfloat16));
  for (int64_t token = 0; token < count; token += 2) {
    const bfloat16* one = row_of<const bfloat16>(from, head, first + token);
    const bool single = token + 1 == count;
    const bfloat16* next = single ? one : row_of<const bfloat16>(from, head, first + token + 1);
    const uint16_t kept = single ? 0 : 0xffff;
    for (int64_t panel = 0; panel < head_dim; panel += kTile) {
      bfloat16* out = to + panel * depth + token * kTile;
      const int64_t end = std::min(kTile, head_dim - panel);
      for (int64_t i = 0; i < end; ++i) {
        const bfloat16 below{static_cast<uint16_t>(next[panel + i].bits & kept)};
        const uint32_t pair = side_by_side(one[panel + i], below);
        std::memcpy(out + 2 * i, &pair, sizeof(pair));
      }
    }
  }
}

// Floats times a factor to a row of an operand A, zeros up to the width.
[[gnu::always_inline]] inline void round_row(const float* __restrict from, float factor,
                                             int64_t count, int64_t width,
                                             bfloat16* __restrict to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    store(to[i], from[i] * factor);
  for (int64_t i = count; i < width; ++i)
    to[i] = bfloat16{0};
}

// Two neighbouring rows of floats to a row of pairs in each panel of an operand B.
[[gnu::always_inline]] inline void round_pairs(const float* __restrict one,
                                               const float* __restrict next, int64_t columns,
                                               int64_t depth, bfloat16* __restrict to) {
  for (int64_t panel = 0; panel < columns; panel += kTile) {
    bfloat16* out = to + panel * depth;
#pragma omp simd
    for (int64_t i = 0; i < kTile; ++i) {
      bfloat16 above, below;
      store(above, one[panel + i]);
      store(below, next[panel + i]);
      const uint32_t pair = side_by_side(above, below);
      std::memcpy(out + 2 * i, &pair, sizeof(pair));
    }
  }
}

// Floats across, [D, row_stride], times a factor to a head's [count, D].
[[gnu::always_inline]] inline void pack_across(const float* from, int64_t row_stride,
                                               const Heads& to, int64_t head, int64_t first,
                                               int64_t count, int64_t head_dim, float factor) {
  for (int64_t row = 0; row < count; ++row) {
    bfloat16* out = row_of<bfloat16>(to, head, first + row);
    for (int64_t i = 0; i < head_dim; ++i)
      store(out[i], from[i * row_stride + row] * factor);
  }
}

// Scores as a product gives them to those of the softmax; the queries were not scaled, which would
// have rounded them.
[[gnu::always_inline]] inline void scale_scores(float* scores, int64_t keys, int64_t columns,
                                                float scale) {
#pragma omp simd
  for (int64_t j = 0; j < keys; ++j)
    scores[j] *= scale;
  leave_out(scores, keys, columns);
}

struct Bf16Forward {
  [[gnu::always_inline]] static inline void run(const Problem& p, int64_t task, int64_t thread,
                                                int64_t) {
    const auto [head, first_query, num_queries, first_key, num_keys] = range_of(p, task);
    const PairSizes s = pair_sizes(kForwardBlockRows, num_keys, p.head_dim);
    Scratch scratch(p.scratch + thread * p.floats_per_thread);
    const ForwardParts parts = forward_parts(s, scratch);
    pair_channels(p.k, head, first_key, num_keys, p.head_dim, s.key_columns, s.width_depth,
                  parts.keys);
    pair_tokens(p.v, head, first_key, num_keys, p.head_dim, s.width_columns, s.key_depth,
                parts.values);
    for (int64_t begin = 0; begin < num_queries; begin += s.block_rows) {
      const int64_t count = std::min(s.block_rows, num_queries - begin);
      const int64_t rows = round_up(count, kTile), first = first_query + begin;
      copy_rows(p.q, head, first, count, p.head_dim, rows, s.width_depth, parts.queries);
      p.multiply({parts.queries, s.width_depth, parts.keys, parts.scores, s.key_columns, rows,
                  s.key_columns, s.width_depth, false},
                 0, 0, 0);
      float* lse = p.lse + head * p.num_queries + first;
      for (int64_t row = 0; row < count; ++row) {
        float largest;
        float* line = parts.scores + row * s.key_columns;
        scale_scores(line, num_keys, s.key_columns, p.scale);
        const float sum = exponentials<kTile>(line, s.key_columns, largest);
        lse[row] = largest + std::log(sum);
        round_row(line, num_keys == 0 ? 0.0f : 1.0f / sum, s.key_columns, s.key_depth,
                  parts.weights + row * s.key_depth);
      }
      // Weights of rows beyond the count are left over from before; their outputs are not stored.
      p.multiply({parts.weights, s.key_depth, parts.values, parts.outputs, s.width_columns, rows,
                  s.width_columns, s.key_depth, false},
                 0, 0, 0);
      pack<bfloat16>(parts.outputs, s.width_columns, p.out, head, first, count, p.head_dim, 1.0f);
    }
  }
};

// Scores and d_weights of a block to weights and d_scores, and these to operands: both as pairs,
// d_scores as rows too.
[[gnu::always_inline]] inline void round_block(const BackwardParts& parts, const PairSizes& s,
                                               int64_t count, int64_t depth, int64_t keys,
                                               float scale) {
  for (int64_t pair = 0; pair < depth; pair += 2) {
    float* scores = parts.scores + pair * s.key_columns;
    float* d_scores = parts.d_scores + pair * s.key_columns;
    for (int64_t row = pair; row < pair + 2; ++row) {
      float* line = parts.scores + row * s.key_columns;
      float* d_line = parts.d_scores + row * s.key_columns;
      if (row < count) {
        scale_scores(line, keys, s.key_columns, scale);
        scale_row(line, s.key_columns, score_gradients<kTile>(line, d_line, s.key_columns));
        round_row(d_line, 1.0f, s.key_columns, s.key_depth, parts.d_score_rows + row * s.key_depth);
      } else {
        std::memset(line, 0, s.key_columns * sizeof(float));
        std::memset(d_line, 0, s.key_columns * sizeof(float));
      }
    }
    round_pairs(scores, scores + s.key_columns, s.key_columns, depth,
                parts.weight_pairs + pair * kTile);
    round_pairs(d_scores, d_scores + s.key_columns, s.key_columns, depth,
                parts.d_score_pairs + pair * kTile);
  }
}

struct Bf16Backward {
  [[gnu::always_inline]] static inline void run(const Problem& p, int64_t task, int64_t thread,
                                                int64_t) {
    const auto [head, first_query, num_queries, first_key, num_keys] = range_of(p, task);
    const PairSizes s =
        pair_sizes(backward_block_rows(num_queries, num_keys), num_keys, p.head_dim);
    Scratch scratch(p.scratch + thread * p.floats_per_thread);
    const BackwardParts parts = backward_parts(s, scratch);
    pair_channels(p.k, head, first_key, num_keys, p.head_dim, s.key_columns, s.width_depth,
                  parts.keys_across);
    pair_channels(p.v, head, first_key, num_keys, p.head_dim, s.key_columns, s.width_depth,
                  parts.values_across);
    pair_tokens(p.k, head, first_key, num_keys, p.head_dim, s.width_columns, s.key_depth,
                parts.keys);
    for (float* sums : {parts.d_keys_across, parts.d_values_across})
      std::memset(sums, 0, s.width_columns * s.key_columns * sizeof(float));
    for (int64_t begin = 0; begin < num_queries; begin += s.block_rows) {
      const int64_t count = std::min(s.block_rows, num_queries - begin);
      const int64_t first = first_query + begin;
      block(p, s, parts, head, first, count, num_keys);
    }
    pack_across(parts.d_keys_across, s.key_columns, p.d_k, head, first_key, num_keys, p.head_dim,
                p.scale);
    pack_across(parts.d_values_across, s.key_columns, p.d_v, head, first_key, num_keys, p.head_dim,
                1.0f);
  }

  // Gradients of `count` queries from `first`, and what they add to those of keys and values.
  [[gnu::always_inline]] static inline void block(const Problem& p, const PairSizes& s,
                                                  const BackwardParts& parts, int64_t head,
                                                  int64_t first, int64_t count, int64_t num_keys) {
    const int64_t rows = round_up(count, kTile), depth = round_up(count, kTileDepth);
    copy_rows(p.q, head, first, count, p.head_dim, rows, s.width_depth, parts.queries);
    copy_rows(p.out, head, first, count, p.head_dim, rows, s.width_depth, parts.d_outputs);
    copy_across(p.q, head, first, count, p.head_dim, depth, s.width_columns, parts.queries_across);
    copy_across(p.out, head, first, count, p.head_dim, depth, s.width_columns,
                parts.d_outputs_across);
    p.multiply({parts.queries, s.width_depth, parts.keys_across, parts.scores, s.key_columns, rows,
                s.key_columns, s.width_depth, false},
               0, 0, 0);
    p.multiply({parts.d_outputs, s.width_depth, parts.values_across, parts.d_scores, s.key_columns,
                rows, s.key_columns, s.width_depth, false},
               0, 0, 0);
    round_block(parts, s, count, depth, num_keys, p.scale);
    p.multiply({parts.d_score_rows, s.key_depth, parts.keys, parts.d_queries, s.width_columns, rows,
                s.width_columns, s.key_depth, false},
               0, 0, 0);
    pack<bfloat16>(parts.d_queries, s.width_columns, p.d_q, head, first, count, p.head_dim,
                   p.scale);
    p.multiply({parts.queries_across, depth, parts.d_score_pairs, parts.d_keys_across,
                s.key_columns, s.width_columns, s.key_columns, depth, true},
               0, 0, 0);
    p.multiply({parts.d_outputs_across, depth, parts.weight_pairs, parts.d_values_across,
                s.key_columns, s.width_columns, s.key_columns, depth, true},
               0, 0, 0);
  }
};

} // namespace dinov2_fast
