// Attention on the CPU, forward and backward, over packed sequences.
//
// A task is one head of one sequence. Its keys and values are unpacked to float once, then blocks
// of queries pass over them; scores live in the thread's scratch only. Tasks share nothing, so
// results do not depend on the number of threads.
#include "check.hpp"
#include "cpu/attention_tiles.hpp"
#include "cpu/rows.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

// Scores of a block of queries should leave room in a core's second cache (1 to 2 MiB).
constexpr int64_t kScoresPerBlock = 96 * 1024;

struct Heads {
  void* data; // [T, H, D]
  int64_t row_stride;
  int64_t head_stride;
};

struct Problem {
  Heads q, k, v, out;           // out: of the forward pass; its gradient in the backward pass
  Heads d_q, d_k, d_v;          // backward only
  float* lse;                   // [H, Tq]
  const int32_t* query_offsets; // [S + 1]
  const int32_t* key_offsets;   // [S + 1]
  float* scratch;               // threads * floats_per_thread
  int64_t floats_per_thread, num_queries, heads, head_dim;
  float scale;
};

struct Sizes {
  int64_t queries, keys, width;              // of one task; width is D in whole vectors
  int64_t key_columns, key_rows, block_rows; // padded
};

Sizes sizes_of(int64_t queries, int64_t keys, int64_t head_dim) {
  const int64_t columns = padded(keys);
  const int64_t rows =
      std::min(std::max<int64_t>(kScoresPerBlock / std::max<int64_t>(columns, 1), 1),
               std::max<int64_t>(queries, 1));
  return {queries,
          keys,
          round_up(head_dim, kLanes),
          columns,
          round_up(keys, kTileRows),
          round_up(rows, kTileRows)};
}

// Rows [count, D] as floats, zeros up to [rows, width].
template <typename T>
[[gnu::always_inline]] inline void unpack(const Heads& from, int64_t head, int64_t first,
                                          int64_t count, int64_t head_dim, int64_t rows,
                                          int64_t width, float* to) {
  for (int64_t row = 0; row < rows; ++row) {
    float* __restrict out = to + row * width;
    if (row >= count) {
      for (int64_t i = 0; i < width; ++i)
        out[i] = 0.0f;
      continue;
    }
    const T* __restrict in = static_cast<const T*>(from.data) + (first + row) * from.row_stride +
                             head * from.head_stride;
#pragma omp simd
    for (int64_t i = 0; i < head_dim; ++i)
      out[i] = load(in[i]);
    for (int64_t i = head_dim; i < width; ++i)
      out[i] = 0.0f;
  }
}

// The same rows across: [D, columns], zeros beyond count.
template <typename T>
[[gnu::always_inline]] inline void unpack_across(const Heads& from, int64_t head, int64_t first,
                                                 int64_t count, int64_t head_dim, int64_t columns,
                                                 float* to) {
  for (int64_t begin = 0; begin < columns; begin += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t row = begin + lane;
      float* out = to + row;
      if (row >= count) {
        for (int64_t i = 0; i < head_dim; ++i)
          out[i * columns] = 0.0f;
        continue;
      }
      const T* in = static_cast<const T*>(from.data) + (first + row) * from.row_stride +
                    head * from.head_stride;
      for (int64_t i = 0; i < head_dim; ++i)
        out[i * columns] = load(in[i]);
    }
  }
}

template <typename T>
[[gnu::always_inline]] inline void pack(const float* from, int64_t width, const Heads& to,
                                        int64_t head, int64_t first, int64_t count,
                                        int64_t head_dim) {
  for (int64_t row = 0; row < count; ++row) {
    const float* __restrict in = from + row * width;
    T* __restrict out =
        static_cast<T*>(to.data) + (first + row) * to.row_stride + head * to.head_stride;
#pragma omp simd
    for (int64_t i = 0; i < head_dim; ++i)
      store(out[i], in[i]);
  }
}

// Scores of one query to exp(score * scale - largest), in place, zeros beyond the keys.
// Returns the sum; largest is that of the scaled scores.
[[gnu::always_inline]] inline float exponentials(float* scores, int64_t keys, int64_t columns,
                                                 float scale, float& largest) {
  float best[kLanes], sums[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    best[lane] = -std::numeric_limits<float>::infinity();
    sums[lane] = 0.0f;
  }
  for (int64_t j = keys; j < columns; ++j)
    scores[j] = -std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < columns; j += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const float score = j + lane < keys ? scores[j + lane] * scale : scores[j + lane];
      scores[j + lane] = score;
      best[lane] = score > best[lane] ? score : best[lane];
    }
  }
  largest = best[0];
  for (int lane = 1; lane < kLanes; ++lane)
    largest = best[lane] > largest ? best[lane] : largest;
  for (int64_t j = 0; j < columns; j += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const float e = j + lane < keys ? exp_nonpositive(scores[j + lane] - largest) : 0.0f;
      scores[j + lane] = e;
      sums[lane] += e;
    }
  }
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane)
    sum += sums[lane];
  return sum;
}

template <typename T> struct ForwardTask {
  [[gnu::always_inline]] static inline void run(const Problem& p, int64_t task, int64_t thread,
                                                int64_t) {
    const int64_t sequence = task / p.heads, head = task % p.heads;
    const int64_t first_query = p.query_offsets[sequence], first_key = p.key_offsets[sequence];
    const Sizes s = sizes_of(p.query_offsets[sequence + 1] - first_query,
                             p.key_offsets[sequence + 1] - first_key, p.head_dim);
    float* keys = p.scratch + thread * p.floats_per_thread; // [D, key_columns]
    float* values = keys + s.width * s.key_columns;         // [key_rows, width]
    float* queries = values + s.key_rows * s.width;         // [block_rows, width]
    float* outputs = queries + s.block_rows * s.width;
    float* scores = outputs + s.block_rows * s.width; // [block_rows, key_columns]
    unpack_across<T>(p.k, head, first_key, s.keys, p.head_dim, s.key_columns, keys);
    unpack<T>(p.v, head, first_key, s.keys, p.head_dim, s.key_rows, s.width, values);
    for (int64_t begin = 0; begin < s.queries; begin += s.block_rows) {
      const int64_t count = std::min(s.block_rows, s.queries - begin);
      const int64_t rows = round_up(count, kTileRows);
      unpack<T>(p.q, head, first_query + begin, count, p.head_dim, rows, s.width, queries);
      multiply({queries, s.width, 1}, {keys, 0, s.key_columns}, scores, s.key_columns, rows,
               s.key_columns, p.head_dim, false);
      float* lse = p.lse + head * p.num_queries + first_query + begin;
      for (int64_t row = 0; row < count; ++row) {
        float largest;
        float* line = scores + row * s.key_columns;
        const float sum = exponentials(line, s.keys, s.key_columns, p.scale, largest);
        lse[row] = largest + std::log(sum);
        const float inverse = s.keys == 0 ? 0.0f : 1.0f / sum;
        // Normalised before the product: a value times a weight of at most 1 cannot overflow.
#pragma omp simd
        for (int64_t j = 0; j < s.key_columns; ++j)
          line[j] *= inverse;
      }
      multiply({scores, s.key_columns, 1}, {values, 0, s.width}, outputs, s.width, rows, s.width,
               s.keys, false);
      pack<T>(outputs, s.width, p.out, head, first_query + begin, count, p.head_dim);
    }
  }
};

// Scores to weights exp(score * scale - lse), and d_weights to d_scores, in place.
[[gnu::always_inline]] inline void score_gradients(float* __restrict scores,
                                                   float* __restrict gradients, int64_t keys,
                                                   int64_t columns, float scale, float lse) {
  float sums[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    sums[lane] = 0.0f;
  for (int64_t j = 0; j < columns; j += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const float weight = j + lane < keys ? exp_nonpositive(scores[j + lane] * scale - lse) : 0.0f;
      scores[j + lane] = weight;
      sums[lane] += weight * gradients[j + lane];
    }
  }
  float mean = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane)
    mean += sums[lane];
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j)
    gradients[j] = scores[j] * (gradients[j] - mean) * scale;
}

template <typename T> struct BackwardTask {
  [[gnu::always_inline]] static inline void run(const Problem& p, int64_t task, int64_t thread,
                                                int64_t) {
    const int64_t sequence = task / p.heads, head = task % p.heads;
    const int64_t first_query = p.query_offsets[sequence], first_key = p.key_offsets[sequence];
    const Sizes s = sizes_of(p.query_offsets[sequence + 1] - first_query,
                             p.key_offsets[sequence + 1] - first_key, p.head_dim);
    float* keys_across = p.scratch + thread * p.floats_per_thread; // [D, key_columns]
    float* values_across = keys_across + s.width * s.key_columns;
    float* keys = values_across + s.width * s.key_columns; // [key_rows, width]
    float* d_keys = keys + s.key_rows * s.width;
    float* d_values = d_keys + s.key_rows * s.width;
    float* queries = d_values + s.key_rows * s.width; // [block_rows, width]
    float* d_outputs = queries + s.block_rows * s.width;
    float* d_queries = d_outputs + s.block_rows * s.width;
    float* scores = d_queries + s.block_rows * s.width; // [block_rows, key_columns]
    float* d_scores = scores + s.block_rows * s.key_columns;
    unpack_across<T>(p.k, head, first_key, s.keys, p.head_dim, s.key_columns, keys_across);
    unpack_across<T>(p.v, head, first_key, s.keys, p.head_dim, s.key_columns, values_across);
    unpack<T>(p.k, head, first_key, s.keys, p.head_dim, s.key_rows, s.width, keys);
    for (int64_t i = 0; i < 2 * s.key_rows * s.width; ++i)
      d_keys[i] = 0.0f; // and d_values
    for (int64_t begin = 0; begin < s.queries; begin += s.block_rows) {
      const int64_t count = std::min(s.block_rows, s.queries - begin);
      const int64_t rows = round_up(count, kTileRows), first = first_query + begin;
      unpack<T>(p.q, head, first, count, p.head_dim, rows, s.width, queries);
      unpack<T>(p.out, head, first, count, p.head_dim, rows, s.width, d_outputs);
      multiply({queries, s.width, 1}, {keys_across, 0, s.key_columns}, scores, s.key_columns, rows,
               s.key_columns, p.head_dim, false);
      multiply({d_outputs, s.width, 1}, {values_across, 0, s.key_columns}, d_scores, s.key_columns,
               rows, s.key_columns, p.head_dim, false);
      const float* lse = p.lse + head * p.num_queries + first;
      for (int64_t row = 0; row < count; ++row)
        score_gradients(scores + row * s.key_columns, d_scores + row * s.key_columns, s.keys,
                        s.key_columns, p.scale, lse[row]);
      multiply({d_scores, s.key_columns, 1}, {keys, 0, s.width}, d_queries, s.width, rows, s.width,
               s.keys, false);
      pack<T>(d_queries, s.width, p.d_q, head, first, count, p.head_dim);
      multiply({d_scores, 1, s.key_columns}, {queries, 0, s.width}, d_keys, s.width, s.key_rows,
               s.width, count, true);
      multiply({scores, 1, s.key_columns}, {d_outputs, 0, s.width}, d_values, s.width, s.key_rows,
               s.width, count, true);
    }
    pack<T>(d_keys, s.width, p.d_k, head, first_key, s.keys, p.head_dim);
    pack<T>(d_values, s.width, p.d_v, head, first_key, s.keys, p.head_dim);
  }
};

struct Layout {
  int64_t sequences, threads;
  bool backward;
};

// Every thread takes each threads-th task: neighbours, of equal length, go to different ones.
template <template <typename> class Task>
void launch(const char* op, const Problem& p, const Layout& layout, const std::string& dtype,
            const std::string& level_name) {
  const Level level = choose_level(op, level_name);
  with_float_type(op, "q", dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    auto* body = at_level<Task<T>, Problem>(level);
    const int64_t tasks = layout.sequences * p.heads;
    parallel_rows(layout.threads, tasks * kElementsPerThread, static_cast<int>(layout.threads),
                  [&](int64_t first, int64_t last) {
                    for (int64_t thread = first; thread < last; ++thread)
                      for (int64_t task = thread; task < tasks; task += layout.threads)
                        body(p, task, thread, 0);
                  });
  });
}

Heads heads_of(const py::tuple& view) {
  return {reinterpret_cast<void*>(view[0].cast<uintptr_t>()), view[1].cast<int64_t>(),
          view[2].cast<int64_t>()};
}

// Enough for every sequence of at most these lengths: a shorter one has larger blocks of queries,
// but never more than kScoresPerBlock scores and a tile.
int64_t scratch_floats(int64_t max_queries, int64_t max_keys, int64_t head_dim, bool backward) {
  const Sizes s = sizes_of(max_queries, max_keys, head_dim);
  const int64_t rows = round_up(std::max<int64_t>(max_queries, 1), kTileRows);
  const int64_t scores =
      std::min(rows * s.key_columns, kScoresPerBlock + kTileRows * s.key_columns);
  const int64_t across = s.width * s.key_columns, along = s.key_rows * s.width;
  const int64_t floats = backward ? 2 * across + 3 * along + 3 * rows * s.width + 2 * scores
                                  : across + along + 2 * rows * s.width + scores;
  return round_up(floats, kLanes);
}

Problem problem_of(const char* op, uintptr_t lse, uintptr_t query_offsets, uintptr_t key_offsets,
                   uintptr_t scratch, int64_t floats_per_thread, int64_t num_queries, int64_t heads,
                   int64_t head_dim, float scale, int64_t threads) {
  require(heads >= 0 && num_queries >= 0, op, "sizes must not be negative");
  require(head_dim >= 1, op, "head_dim must be at least 1, got " + std::to_string(head_dim));
  require(threads >= 1, op, "threads must be at least 1, got " + std::to_string(threads));
  require(query_offsets != 0 && key_offsets != 0, op, "offsets must not be null pointers");
  require(scratch != 0, op, "scratch must not be a null pointer");
  Problem p{};
  p.lse = reinterpret_cast<float*>(lse);
  p.query_offsets = reinterpret_cast<const int32_t*>(query_offsets);
  p.key_offsets = reinterpret_cast<const int32_t*>(key_offsets);
  p.scratch = reinterpret_cast<float*>(scratch);
  p.floats_per_thread = floats_per_thread;
  p.num_queries = num_queries;
  p.heads = heads;
  p.head_dim = head_dim;
  p.scale = scale;
  return p;
}

void attention_forward(const py::tuple& q, const py::tuple& k, const py::tuple& v,
                       const py::tuple& out, uintptr_t lse, uintptr_t query_offsets,
                       uintptr_t key_offsets, uintptr_t scratch, int64_t floats_per_thread,
                       int64_t sequences, int64_t num_queries, int64_t heads, int64_t head_dim,
                       float scale, const std::string& dtype, int64_t threads,
                       const std::string& level) {
  constexpr const char* op = "attention_forward_cpu";
  Problem p = problem_of(op, lse, query_offsets, key_offsets, scratch, floats_per_thread,
                         num_queries, heads, head_dim, scale, threads);
  p.q = heads_of(q), p.k = heads_of(k), p.v = heads_of(v), p.out = heads_of(out);
  const py::gil_scoped_release release;
  launch<ForwardTask>(op, p, {sequences, threads, false}, dtype, level);
}

void attention_backward(const py::tuple& d_out, const py::tuple& q, const py::tuple& k,
                        const py::tuple& v, const py::tuple& d_q, const py::tuple& d_k,
                        const py::tuple& d_v, uintptr_t lse, uintptr_t query_offsets,
                        uintptr_t key_offsets, uintptr_t scratch, int64_t floats_per_thread,
                        int64_t sequences, int64_t num_queries, int64_t heads, int64_t head_dim,
                        float scale, const std::string& dtype, int64_t threads,
                        const std::string& level) {
  constexpr const char* op = "attention_backward_cpu";
  Problem p = problem_of(op, lse, query_offsets, key_offsets, scratch, floats_per_thread,
                         num_queries, heads, head_dim, scale, threads);
  p.q = heads_of(q), p.k = heads_of(k), p.v = heads_of(v), p.out = heads_of(d_out);
  p.d_q = heads_of(d_q), p.d_k = heads_of(d_k), p.d_v = heads_of(d_v);
  const py::gil_scoped_release release;
  launch<BackwardTask>(op, p, {sequences, threads, true}, dtype, level);
}

} // namespace
} // namespace dinov2_fast

void bind_attention_cpu(py::module_& m) {
  using namespace dinov2_fast;
  m.def("attention_scratch_floats_cpu", &scratch_floats,
        "Floats of scratch that one thread needs for sequences of at most these lengths.",
        py::arg("max_queries"), py::arg("max_keys"), py::arg("head_dim"), py::arg("backward"));
  m.def("attention_forward_cpu", &attention_forward,
        "q, k, v -> out, each (pointer, row stride, head stride); lse [H, Tq] float32.",
        py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
        py::arg("query_offsets"), py::arg("key_offsets"), py::arg("scratch"),
        py::arg("floats_per_thread"), py::arg("sequences"), py::arg("num_queries"),
        py::arg("heads"), py::arg("head_dim"), py::arg("scale"), py::arg("dtype"),
        py::arg("threads"), py::arg("level"));
  m.def("attention_backward_cpu", &attention_backward,
        "d_out, q, k, v -> d_q, d_k, d_v, each (pointer, row stride, head stride).",
        py::arg("d_out"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("d_q"), py::arg("d_k"),
        py::arg("d_v"), py::arg("lse"), py::arg("query_offsets"), py::arg("key_offsets"),
        py::arg("scratch"), py::arg("floats_per_thread"), py::arg("sequences"),
        py::arg("num_queries"), py::arg("heads"), py::arg("head_dim"), py::arg("scale"),
        py::arg("dtype"), py::arg("threads"), py::arg("level"));
}
