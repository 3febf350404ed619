// Attention on the CPU, forward and backward, over packed sequences.
//
// A task is one head of one sequence. Its keys and values are unpacked to float once, then blocks
// of queries pass over them; scores live in the thread's scratch only. Sequences of a few tokens go
// by dot products (attention_few.hpp). Tasks share nothing, so results do not depend on the number
// of threads. Where the processor multiplies bf16 matrices, bf16 tensors go by the tasks of
// attention_bf16.hpp instead.
#include "check.hpp"
#include "cpu/attention_bf16.hpp"
#include "cpu/attention_few.hpp"
#include "cpu/attention_task.hpp"
#include "cpu/bf16_products.hpp"
#include "cpu/float_products.hpp"
#include "cpu/rows.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

// How many scores a block of queries has at most, and how many rows at least. Backward each block
// makes scores and their gradients, and adds to the gradients of all keys: few scores leave a
// second cache of 512 KiB to those, and fewer rows would read and write them too often.
struct Blocks {
  int64_t scores, least_rows;
};
constexpr Blocks kForwardBlocks{kScoresPerBlock, 1}, kBackwardBlocks{24 * 1024, 24};

struct Sizes {
  int64_t queries, keys, width;              // of one task; width is D in whole vectors
  int64_t key_columns, key_rows, block_rows; // padded
};

Sizes sizes_of(int64_t queries, int64_t keys, int64_t head_dim, int lanes, const Blocks& blocks) {
  const int64_t columns = round_up(keys, lanes);
  const int64_t fitting =
      std::max(blocks.scores / std::max<int64_t>(columns, 1), blocks.least_rows);
  const int64_t rows = std::min(fitting, std::max<int64_t>(queries, 1));
  return {queries,
          keys,
          round_up(head_dim, lanes),
          columns,
          round_up(keys, kRowStep),
          round_up(rows, kRowStep)};
}

template <typename T> [[gnu::always_inline]] inline Four load_four(const T* from) {
  return Four{load(from[0]), load(from[1]), load(from[2]), load(from[3])};
}

// The same rows across: [D, columns], zeros beyond count. Sixteen columns fill a cache line, which
// is written whole before the next.
template <typename T>
[[gnu::always_inline]] inline void unpack_across(const Heads& from, int64_t head, int64_t first,
                                                 int64_t count, int64_t head_dim, int64_t columns,
                                                 float* to) {
  constexpr int64_t kColumns = 16;
  const int64_t whole = head_dim / 4 * 4;
  for (int64_t begin = 0; begin < columns; begin += kColumns) {
    const int64_t end = std::min(begin + kColumns, columns);
    for (int64_t i = 0; i < whole; i += 4)
      for (int64_t column = begin; column < end; column += 4) {
        Four rows[4];
        for (int64_t r = 0; r < 4; ++r)
          rows[r] = column + r < count ? load_four(row_of<T>(from, head, first + column + r) + i)
                                       : Four{};
        transpose(rows);
        for (int64_t r = 0; r < 4; ++r)
          *reinterpret_cast<Four*>(to + (i + r) * columns + column) = rows[r];
      }
    for (int64_t i = whole; i < head_dim; ++i)
      for (int64_t column = begin; column < end; ++column)
        to[i * columns + column] =
            column < count ? load(row_of<T>(from, head, first + column)[i]) : 0.0f;
  }
}

template <typename T, typename Isa> struct ForwardTask {
  [[gnu::always_inline]] static inline void run(const Problem& p, int64_t task, int64_t thread,
                                                int64_t next_task) {
    const TaskRange range = range_of(p, task), next = range_of(p, next_task);
    float* scratch = p.scratch + thread * p.floats_per_thread;
    if (has_few_tokens(range))
      return forward_few<T, Isa::kLanes>(p, range, next, scratch);
    const auto [head, first_query, num_queries, first_key, num_keys] = range;
    const Sizes s = sizes_of(num_queries, num_keys, p.head_dim, Isa::kLanes, kForwardBlocks);
    float* keys = scratch;                          // [D, key_columns]
    float* values = keys + s.width * s.key_columns; // [key_rows, width]
    float* queries = values + s.key_rows * s.width; // [block_rows, width]
    float* outputs = queries + s.block_rows * s.width;
    float* scores = outputs + s.block_rows * s.width; // [block_rows, key_columns]
    unpack_across<T>(p.k, head, first_key, s.keys, p.head_dim, s.key_columns, keys);
    unpack<T>(p.v, head, first_key, s.keys, p.head_dim, 1.0f, s.key_rows, s.width, values);
    for (int64_t begin = 0; begin < s.queries; begin += s.block_rows) {
      const int64_t count = std::min(s.block_rows, s.queries - begin);
      const int64_t rows = round_up(count, kRowStep);
      unpack<T>(p.q, head, first_query + begin, count, p.head_dim, p.scale, rows, s.width, queries);
      multiply<Isa>({queries, s.width, 1}, {keys, 0, s.key_columns}, scores, s.key_columns, rows,
                    s.key_columns, p.head_dim, false);
      float* lse = p.lse + head * p.num_queries + first_query + begin;
      for (int64_t row = 0; row < count; ++row) {
        prefetch_next<T>(p, next, begin + row, false);
        float largest;
        float* line = scores + row * s.key_columns;
        leave_out(line, s.keys, s.key_columns);
        const float sum = exponentials<Isa::kLanes>(line, s.key_columns, largest);
        lse[row] = largest + std::log(sum);
        const float inverse = s.keys == 0 ? 0.0f : 1.0f / sum;
        // Normalised before the product: a value times a weight of at most 1 cannot overflow.
#pragma omp simd
        for (int64_t j = 0; j < s.key_columns; ++j)
          line[j] *= inverse;
      }
      multiply<Isa>({scores, s.key_columns, 1}, {values, 0, s.width}, outputs, s.width, rows,
                    s.width, s.keys, false);
      pack<T>(outputs, s.width, p.out, head, first_query + begin, count, p.head_dim, 1.0f);
    }
  }
};

template <typename T, typename Isa> struct BackwardTask {
  [[gnu::always_inline]] static inline void run(const Problem& p, int64_t task, int64_t thread,
                                                int64_t next_task) {
    const TaskRange range = range_of(p, task), next = range_of(p, next_task);
    float* scratch = p.scratch + thread * p.floats_per_thread;
    if (has_few_tokens(range))
      return backward_few<T, Isa::kLanes>(p, range, next, scratch);
    const auto [head, first_query, num_queries, first_key, num_keys] = range;
    const Sizes s = sizes_of(num_queries, num_keys, p.head_dim, Isa::kLanes, kBackwardBlocks);
    float* keys_across = scratch; // [D, key_columns]
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
    unpack<T>(p.k, head, first_key, s.keys, p.head_dim, 1.0f, s.key_rows, s.width, keys);
    for (int64_t i = 0; i < 2 * s.key_rows * s.width; ++i)
      d_keys[i] = 0.0f; // and d_values
    for (int64_t begin = 0; begin < s.queries; begin += s.block_rows) {
      const int64_t count = std::min(s.block_rows, s.queries - begin);
      const int64_t rows = round_up(count, kRowStep), first = first_query + begin;
      unpack<T>(p.q, head, first, count, p.head_dim, p.scale, rows, s.width, queries);
      unpack<T>(p.out, head, first, count, p.head_dim, 1.0f, rows, s.width, d_outputs);
      multiply<Isa>({queries, s.width, 1}, {keys_across, 0, s.key_columns}, scores, s.key_columns,
                    rows, s.key_columns, p.head_dim, false);
      multiply<Isa>({d_outputs, s.width, 1}, {values_across, 0, s.key_columns}, d_scores,
                    s.key_columns, rows, s.key_columns, p.head_dim, false);
      for (int64_t row = 0; row < count; ++row) {
        prefetch_next<T>(p, next, begin + row, true);
        float* line = scores + row * s.key_columns;
        leave_out(line, s.keys, s.key_columns);
        const float inverse =
            score_gradients<Isa::kLanes>(line, d_scores + row * s.key_columns, s.key_columns);
        scale_row(d_outputs + row * s.width, s.width, inverse);
      }
      multiply<Isa>({d_scores, s.key_columns, 1}, {keys, 0, s.width}, d_queries, s.width, rows,
                    s.width, s.keys, false);
      pack<T>(d_queries, s.width, p.d_q, head, first, count, p.head_dim, p.scale);
      multiply<Isa>({d_scores, 1, s.key_columns}, {queries, 0, s.width}, d_keys, s.width,
                    s.key_rows, s.width, count, true);
      multiply<Isa>({scores, 1, s.key_columns}, {d_outputs, 0, s.width}, d_values, s.width,
                    s.key_rows, s.width, count, true);
    }
    pack<T>(d_keys, s.width, p.d_k, head, first_key, s.keys, p.head_dim, 1.0f);
    pack<T>(d_values, s.width, p.d_v, head, first_key, s.keys, p.head_dim, 1.0f);
  }
};

struct Work {
  int64_t sequences, threads;
  std::string dtype;
  Level level;
  Products products;
};

// Names that stand for a level's products computed by their definition, on any processor.
Products defined_products(const std::string& level) {
  return level == "defined_amx"           ? Products::defined_amx
         : level == "defined_avx512_bf16" ? Products::defined_avx512_bf16
                                          : Products::none;
}

Products products_of(Level level) {
  return level == Level::amx           ? Products::amx
         : level == Level::avx512_bf16 ? Products::avx512_bf16
                                       : Products::none;
}

// What calls choose from: instruction sets, and those of them whose bf16 products come out wrong.
struct Levels {
  std::vector<Level> all, wrong;
  bool warned = false;
};

Levels& tried_levels() {
  static Levels levels = [] {
    Levels tried{available_levels(), {}};
    for (Level level : tried.all)
      if (MultiplyFunction multiply = multiply_on(products_of(level));
          multiply && !products_agree([=](const Bf16Product& p) { multiply(p, 0, 0, 0); }))
        tried.wrong.push_back(level);
    return tried;
  }();
  return levels;
}

// What multiplies: bf16 tensors by products of their own type where the level has them. Needs the
// GIL, since a processor whose products are wrong is warned about, once.
Work choose_work(const char* op, const std::string& dtype, const std::string& name,
                 Levels& levels = tried_levels()) {
  const Products defined = defined_products(name);
  if (dtype == "bfloat16" && defined != Products::none)
    return {0, 0, dtype, levels.all.back(), defined};
  const Level level = choose_level(op, name, levels.all);
  const Products products = dtype == "bfloat16" ? products_of(level) : Products::none;
  if (products == Products::none || !contains(levels.wrong, level))
    return {0, 0, dtype, level, products};
  const std::string what = std::string("products of bf16 matrices by ") + name_of(level) +
                           " come out wrong on this processor";
  if (name != "auto")
    refuse(op, what + "; use another DINOV2_FAST_CPU_LEVEL");
  const bool first = !levels.warned;
  levels.warned = true;
  if (first &&
      PyErr_WarnEx(PyExc_RuntimeWarning, (what + ": attention computes in float").c_str(), 1) < 0)
    throw py::error_already_set();
  return {0, 0, dtype, level, Products::none};
}

// The task with tiles that fit each instruction set's registers.
template <template <typename, typename> class Task, typename T> auto task_at(Level level) {
  if (level >= Level::avx512)
    return at_level<Task<T, Avx512>, Problem>(level);
  if (level == Level::avx2)
    return at_level<Task<T, Avx2>, Problem>(level);
  return at_level<Task<T, Baseline>, Problem>(level);
}

// Scratch that a task has on its thread's stack where nobody gives it any: allocating it would take
// as long as a head of a few tokens. Enough for the forward pass of 50 tokens with heads of 64.
constexpr int64_t kStackFloats = 16 * 1024;

template <typename Body>
void run_on_stack(const Body& body, const Problem& p, int64_t task, int64_t thread, int64_t next) {
  alignas(64) float scratch[kStackFloats];
  Problem own = p;
  own.scratch = scratch, own.floats_per_thread = 0;
  body(own, task, thread, next);
}

template <template <typename, typename> class Task, typename Bf16Task>
void launch(const char* op, const Problem& p, const Work& work) {
  with_float_type(op, "q", work.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    auto* body = task_at<Task, T>(work.level);
    if (p.multiply != nullptr)
      body = at_level<Bf16Task, Problem>(work.level);
    parallel_tasks(work.sequences * p.heads, work.threads,
                   [&](int64_t task, int64_t thread, int64_t next) {
                     if (p.scratch == nullptr)
                       run_on_stack(body, p, task, thread, next);
                     else
                       body(p, task, thread, next);
                   });
  });
}

// A [T, H, D] tensor as (pointer, row stride, head stride).
Heads heads_of(const py::handle& tensor) {
  const auto view = tensor.cast<py::tuple>();
  return {reinterpret_cast<void*>(view[0].cast<uintptr_t>()), view[1].cast<int64_t>(),
          view[2].cast<int64_t>()};
}

// Padding is widest here; others need less.
constexpr int kMostLanes = Avx512::kLanes;

// Enough for every sequence of at most these lengths: a shorter one has larger blocks of queries,
// but never more than the scores of a block and a tile, or of its least rows.
int64_t float_scratch_floats(int64_t max_queries, int64_t max_keys, int64_t head_dim,
                             bool backward) {
  const Blocks& blocks = backward ? kBackwardBlocks : kForwardBlocks;
  const Sizes s = sizes_of(max_queries, max_keys, head_dim, kMostLanes, blocks);
  const int64_t rows = round_up(std::max<int64_t>(max_queries, 1), kRowStep);
  const int64_t most = std::max(blocks.scores + kRowStep * s.key_columns,
                                round_up(blocks.least_rows, kRowStep) * s.key_columns);
  const int64_t scores = std::min(rows * s.key_columns, most);
  const int64_t across = s.width * s.key_columns, along = s.key_rows * s.width;
  const int64_t floats = backward ? 2 * across + 3 * along + 3 * rows * s.width + 2 * scores
                                  : across + along + 2 * rows * s.width + scores;
  return round_up(floats, kMostLanes);
}

int64_t longest_of(const int32_t* offsets, int64_t sequences) {
  int64_t longest = 0;
  for (int64_t i = 0; i < sequences; ++i)
    longest = std::max<int64_t>(longest, offsets[i + 1] - offsets[i]);
  return longest;
}

// Checks, lets go of the GIL and runs. Returns 0, or the floats of scratch that a thread needs
// where it was given fewer: then nothing was computed. Arguments have an order, since looking up
// twenty names takes as long as a head of a few tokens.
template <template <typename, typename> class Task, typename Bf16Task, bool kBackward>
int64_t attention(const py::tuple& tensors, uintptr_t lse, uintptr_t query_offsets,
                  uintptr_t key_offsets, int64_t sequences, int64_t num_queries, int64_t heads,
                  int64_t head_dim, float scale, const std::string& dtype, int64_t threads,
                  const std::string& level, uintptr_t scratch, int64_t floats_per_thread) {
  constexpr const char* op = kBackward ? "attention_backward_cpu" : "attention_forward_cpu";
  constexpr size_t kTensors = kBackward ? 7 : 4;
  if (tensors.size() != kTensors)
    refuse(op, "expected " + std::to_string(kTensors) + " tensors, got " +
                   std::to_string(tensors.size()));
  require_not_negative(op, "sequences", sequences);
  require_not_negative(op, "num_queries", num_queries);
  require_not_negative(op, "heads", heads);
  require_positive(op, "head_dim", head_dim);
  require_positive(op, "threads", threads);
  Work work = choose_work(op, dtype, level);
  work.sequences = sequences, work.threads = threads;
  Problem p{};
  p.q = heads_of(tensors[0]), p.k = heads_of(tensors[1]), p.v = heads_of(tensors[2]);
  p.out = heads_of(tensors[3]);
  if (kBackward)
    p.d_q = heads_of(tensors[4]), p.d_k = heads_of(tensors[5]), p.d_v = heads_of(tensors[6]);
  p.lse = reinterpret_cast<float*>(lse);
  p.query_offsets = reinterpret_cast<const int32_t*>(query_offsets);
  p.key_offsets = reinterpret_cast<const int32_t*>(key_offsets);
  p.scratch = reinterpret_cast<float*>(scratch), p.floats_per_thread = floats_per_thread;
  p.num_queries = num_queries, p.heads = heads, p.head_dim = head_dim, p.scale = scale;
  p.multiply = multiply_on(work.products);
  require_pointer(op, "query_offsets", p.query_offsets);
  require_pointer(op, "key_offsets", p.key_offsets);
  const auto scratch_floats = p.multiply == nullptr ? float_scratch_floats : pair_scratch_floats;
  const int64_t needed = scratch_floats(longest_of(p.query_offsets, sequences),
                                        longest_of(p.key_offsets, sequences), head_dim, kBackward);
  if (needed > (p.scratch == nullptr ? kStackFloats : floats_per_thread))
    return needed;
  const py::gil_scoped_release released;
  launch<Task, Bf16Task>(op, p, work);
  return 0;
}

bool defined_products_agree(const std::string& level, int64_t damaged) {
  return products_agree([&](const Bf16Product& p) {
    multiply_on(defined_products(level))(p, 0, 0, 0);
    if (damaged >= 0)
      p.c[damaged] += 1.0f;
  });
}

// Levels by name, of which the narrowest is there always; calls ask for names in turn.
std::vector<std::pair<std::string, bool>>
choose_bf16_products(const std::vector<std::string>& names, const std::vector<std::string>& levels,
                     const std::vector<std::string>& wrong) {
  Levels made_up;
  for (Level level : kLevels) {
    const auto named = [&](const std::string& name) { return name == name_of(level); };
    if (level == Level::baseline || std::any_of(levels.begin(), levels.end(), named))
      made_up.all.push_back(level);
    if (std::any_of(wrong.begin(), wrong.end(), named))
      made_up.wrong.push_back(level);
  }
  std::vector<std::pair<std::string, bool>> chosen;
  for (const std::string& name : names) {
    const Work work = choose_work("choose_bf16_products_cpu", "bfloat16", name, made_up);
    chosen.emplace_back(name_of(work.level), work.products != Products::none);
  }
  return chosen;
}

} // namespace
} // namespace dinov2_fast

void bind_attention_cpu(py::module_& m) {
  using namespace dinov2_fast;
  m.def(
      "wrong_bf16_products_cpu", [] { return names_of(tried_levels().wrong); },
      "Instruction sets of this processor whose products of bf16 matrices come out wrong.");
  m.def("defined_bf16_products_agree_cpu", &defined_products_agree,
        "Whether a level's products, computed by their definition, are the products of matrices; "
        "with one sum off by one, where `damaged` says at which of 48 * 112 sums.",
        py::arg("level"), py::arg("damaged") = -1);
  m.def("choose_bf16_products_cpu", &choose_bf16_products,
        "(level, whether it multiplies bf16 matrices) for each name that calls ask for, one after "
        "the other, on a processor with some levels, of which some come out wrong.",
        py::arg("names"), py::arg("levels"), py::arg("wrong"));
  const auto bind = [&m](const char* name, auto run, const char* what) {
    m.def(name, run, what, py::arg("tensors"), py::arg("lse"), py::arg("query_offsets"),
          py::arg("key_offsets"), py::arg("sequences"), py::arg("num_queries"), py::arg("heads"),
          py::arg("head_dim"), py::arg("scale"), py::arg("dtype"), py::arg("threads"),
          py::arg("level"), py::arg("scratch") = 0, py::arg("floats_per_thread") = 0);
  };
  bind(
      "attention_forward_cpu", &attention<ForwardTask, Bf16Forward, false>,
      "q, k, v -> out, each (pointer, row stride, head stride); lse [H, Tq] float32; query_offsets "
      "and key_offsets [S + 1] int32. Scratch of each thread, or a null pointer for that of its "
      "stack. Returns 0, or how many floats of scratch a thread needs where it has fewer: then "
      "nothing was computed.");
  bind("attention_backward_cpu", &attention<BackwardTask, Bf16Backward, true>,
       "As forward, with q, k, v, d_out -> d_q, d_k, d_v; lse is not read and may be null.");
}
