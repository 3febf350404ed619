// Sinkhorn-Knopp on the CPU: the two passes of an iteration over scores [R, K]; what processes
// exchange in between is Python's.
//
// Columns: largest score and sum of exp relative to it, in one sweep. Threads split the columns; a
// tile of rows and columns is read from memory once and twice more from L1.
// Rows: logarithm of the sum of exp of each row.
// Balance: one pass that ends an iteration and begins the next. A row's exp(score + log_u + log_v),
// at most 1 since columns sum to 1, give the row's new log_v and, times its change, the columns'
// sums: no search for the largest score, and one exp an element where two passes take two.
#include "check.hpp"
#include "cpu/exp_any.hpp"
#include "cpu/level.hpp"
#include "cpu/parallel.hpp"
#include "cpu/rows.hpp"
#include "cpu/scalar_math.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

constexpr int64_t kColumns = 512; // of a tile; with kRows rows of float32 it takes 16 KiB
constexpr int64_t kRows = 8;
constexpr int64_t kRowBlock = 1024; // columns of a partial sum of a row

struct Columns {
  const void* logits;  // [R, K]
  const float* offset; // [R] log_v
  float* largest;      // [K]
  float* sums;         // [K] of exp(scores - largest)
  int64_t rows;
  int64_t columns;
  int64_t row_stride; // elements
  float scale;        // 1 / temperature
};

struct Rows {
  const void* logits;  // [R, K]
  const float* offset; // [K] log_u
  float* lse;          // [R]
  int64_t columns;
  int64_t row_stride; // elements
  float scale;        // 1 / temperature
};

struct Balance {
  const void* logits; // [R, K]
  const float* log_u; // [K]
  const float* log_v; // [R]
  float* next_v;      // [R]
  float* sums;        // [blocks, K] over a block's rows
  float* exps;        // [blocks, K] of one row
  int64_t columns;
  int64_t row_stride; // elements
  float scale;        // 1 / temperature
  bool wants_sums;
};

// One tile: moves the largest scores and the sums of `count` columns on by `rows` rows.
template <typename T>
[[gnu::always_inline]] inline void tile(const T* logits, const float* offset, int64_t rows,
                                        int64_t count, int64_t row_stride, float scale,
                                        float* __restrict largest, float* __restrict sums) {
  alignas(64) float higher[kColumns];
  std::copy(largest, largest + count, higher);
  for (int64_t r = 0; r < rows; ++r) {
    const T* __restrict x = logits + r * row_stride;
    const float shift = offset[r];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float score = load(x[i]) * scale + shift;
      higher[i] = score > higher[i] ? score : higher[i];
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    // A column without weight so far has nothing to move: its sum is 0.
    const float before = largest[i] == -INFINITY ? higher[i] : largest[i];
    sums[i] *= exp_nonpositive(before == higher[i] ? 0.0f : before - higher[i]);
    largest[i] = higher[i];
  }
  for (int64_t r = 0; r < rows; ++r) {
    const T* __restrict x = logits + r * row_stride;
    const float shift = offset[r];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float score = load(x[i]) * scale + shift;
      const float from = largest[i] == -INFINITY ? 0.0f : largest[i];
      sums[i] += exp_nonpositive(score - from);
    }
  }
}

// [begin, end) counts blocks of kColumns columns.
template <typename T>
[[gnu::always_inline]] inline void part_of(const Columns& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kColumns, count = std::min(kColumns, p.columns - first);
    float *largest = p.largest + first, *sums = p.sums + first;
    std::fill(largest, largest + count, -INFINITY);
    std::fill(sums, sums + count, 0.0f);
    for (int64_t r = 0; r < p.rows; r += kRows)
      tile(static_cast<const T*>(p.logits) + r * p.row_stride + first, p.offset + r,
           std::min(kRows, p.rows - r), count, p.row_stride, p.scale, largest, sums);
  }
}

template <typename T>
[[gnu::always_inline]] inline void part_of(const Rows& p, int64_t begin, int64_t end) {
  const float scale = p.scale;
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict x = static_cast<const T*>(p.logits) + row * p.row_stride;
    const float* __restrict offset = p.offset;
    float largest = -INFINITY; // NaN never wins; it comes back in the sum
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < p.columns; ++i) {
      const float score = load(x[i]) * scale + offset[i];
      largest = score > largest ? score : largest;
    }
    const float from = std::isinf(largest) ? 0.0f : largest;
    double sum = 0.0;
    for (int64_t k = 0; k < p.columns; k += kRowBlock) {
      const int64_t last = std::min(k + kRowBlock, p.columns);
      float part = 0.0f;
#pragma omp simd reduction(+ : part)
      for (int64_t i = k; i < last; ++i)
        part += exp_any(load(x[i]) * scale + offset[i] - from);
      sum += static_cast<double>(part);
    }
    p.lse[row] = static_cast<float>(std::log(sum) + static_cast<double>(from));
  }
}

// exps[k] = exp(score + log_u - from) for scores up to `from`, 0 where it would be subnormal;
// returns their sum.
template <typename T>
[[gnu::always_inline]] inline double exps_of(const Balance& p, const T* __restrict x, float from,
                                             float* __restrict exps) {
  const float* __restrict log_u = p.log_u;
  const float scale = p.scale;
  double sum = 0.0;
  for (int64_t k = 0; k < p.columns; k += kRowBlock) {
    const int64_t last = std::min(k + kRowBlock, p.columns);
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = k; i < last; ++i) {
      const float e = exp_normal_or_zero(load(x[i]) * scale + log_u[i] - from);
      exps[i] = e;
      part += e;
    }
    sum += static_cast<double>(part);
  }
  return sum;
}

template <typename T>
[[gnu::always_inline]] inline float largest_of(const Balance& p, const T* __restrict x) {
  const float* __restrict log_u = p.log_u;
  float largest = -INFINITY; // NaN never wins; it comes back in the sum
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < p.columns; ++i) {
    const float score = load(x[i]) * p.scale + log_u[i];
    largest = score > largest ? score : largest;
  }
  return largest;
}

template <typename T> struct BalanceRows {
  [[gnu::always_inline]] static inline void run(const Balance& p, int64_t block, int64_t begin,
                                                int64_t end) {
    constexpr double kLeast = 1e-20; // terms below 1e-38 are lost, which a smaller sum may feel
    float* __restrict sums = p.sums + block * p.columns;
    float* __restrict exps = p.exps + block * p.columns;
    std::fill(sums, sums + p.columns, 0.0f);
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.logits) + row * p.row_stride;
      float from = -p.log_v[row];
      double sum = exps_of(p, x, from, exps);
      if (!(sum > kLeast && std::isfinite(sum))) {
        const float largest = largest_of(p, x);
        if (!std::isinf(largest)) {
          from = largest;
          sum = exps_of(p, x, from, exps);
        }
      }
      const float next = static_cast<float>(-std::log(sum) - static_cast<double>(from));
      p.next_v[row] = next;
      if (!p.wants_sums)
        continue;
      // Of the rounded numbers: `next` is what the columns' sums are made with.
      const auto factor =
          static_cast<float>(std::exp(static_cast<double>(from) + static_cast<double>(next)));
#pragma omp simd
      for (int64_t i = 0; i < p.columns; ++i)
        sums[i] += exps[i] * factor;
    }
  }
};

template <typename T, typename P> void part_baseline(const P& p, int64_t begin, int64_t end) {
  part_of<T>(p, begin, end);
}

#if defined(__x86_64__)
template <typename T, typename P>
[[gnu::target("avx2,fma")]] void part_avx2(const P& p, int64_t begin, int64_t end) {
  part_of<T>(p, begin, end);
}

template <typename T, typename P>
[[gnu::target("avx512f,avx512bw,avx512dq,avx512vl,fma")]] void
part_avx512(const P& p, int64_t begin, int64_t end) {
  part_of<T>(p, begin, end);
}
#endif

template <typename T, typename P>
void run(const P& p, int64_t parts, int64_t width, int threads, Level level) {
  auto* body = part_baseline<T, P>;
#if defined(__x86_64__)
  if (level == Level::avx2)
    body = part_avx2<T, P>;
  if (level >= Level::avx512)
    body = part_avx512<T, P>;
#else
  (void)level;
#endif
  parallel_rows(parts, width, threads, [&](int64_t begin, int64_t end) { body(p, begin, end); });
}

template <typename P>
void launch(const char* op, const P& p, int64_t parts, int64_t width, const std::string& dtype,
            int threads, const std::string& level_name) {
  const Level level = choose_level(op, level_name);
  if (dtype == "float32")
    run<float>(p, parts, width, threads, level);
  else if (dtype == "bfloat16")
    run<bfloat16>(p, parts, width, threads, level);
  else if (dtype == "float16")
    run<float16>(p, parts, width, threads, level);
  else
    throw py::value_error(std::string(op) + ": expected float32, bfloat16 or float16, got " +
                          dtype);
}

void require_arguments(const char* op, const void* logits, int64_t rows, int64_t columns,
                       int64_t row_stride, int threads) {
  require(rows >= 0, op, "rows must not be negative, got " + std::to_string(rows));
  require(columns >= 0, op, "columns must not be negative, got " + std::to_string(columns));
  require(threads >= 1, op, "threads must be at least 1, got " + std::to_string(threads));
  require_matrix(op, "logits", logits, rows, columns, row_stride, false);
}

void sinkhorn_columns(uintptr_t logits, uintptr_t log_v, uintptr_t largest, uintptr_t sums,
                      int64_t rows, int64_t columns, int64_t row_stride, double scale,
                      const std::string& dtype, int threads, const std::string& level) {
  constexpr const char* op = "sinkhorn_columns_cpu";
  const Columns p{reinterpret_cast<const void*>(logits),
                  reinterpret_cast<const float*>(log_v),
                  reinterpret_cast<float*>(largest),
                  reinterpret_cast<float*>(sums),
                  rows,
                  columns,
                  row_stride,
                  static_cast<float>(scale)};
  require_arguments(op, p.logits, rows, columns, row_stride, threads);
  const int64_t blocks = (columns + kColumns - 1) / kColumns;
  launch(op, p, blocks, rows * kColumns, dtype, threads, level);
}

void sinkhorn_rows(uintptr_t logits, uintptr_t log_u, uintptr_t lse, int64_t rows, int64_t columns,
                   int64_t row_stride, double scale, const std::string& dtype, int threads,
                   const std::string& level) {
  constexpr const char* op = "sinkhorn_rows_cpu";
  const Rows p{reinterpret_cast<const void*>(logits),
               reinterpret_cast<const float*>(log_u),
               reinterpret_cast<float*>(lse),
               columns,
               row_stride,
               static_cast<float>(scale)};
  require_arguments(op, p.logits, rows, columns, row_stride, threads);
  launch(op, p, rows, columns, dtype, threads, level);
}

void sinkhorn_balance(uintptr_t logits, uintptr_t log_u, uintptr_t log_v, uintptr_t next_v,
                      uintptr_t sums, uintptr_t scratch, int64_t rows, int64_t columns,
                      int64_t block_rows, int64_t row_stride, double scale,
                      const std::string& dtype, int threads, const std::string& level_name) {
  constexpr const char* op = "sinkhorn_balance_cpu";
  float* parts = reinterpret_cast<float*>(scratch);
  const int64_t blocks = block_rows < 1 ? 0 : blocks_of(rows, block_rows);
  const Balance p{reinterpret_cast<const void*>(logits),
                  reinterpret_cast<const float*>(log_u),
                  reinterpret_cast<const float*>(log_v),
                  reinterpret_cast<float*>(next_v),
                  parts,
                  parts + blocks * columns,
                  columns,
                  row_stride,
                  static_cast<float>(scale),
                  sums != 0};
  require_arguments(op, p.logits, rows, columns, row_stride, threads);
  require_positive(op, "block_rows", block_rows);
  const Level level = choose_level(op, level_name);
  const auto launch_as = [&](auto* body) {
    parallel_blocks(rows, block_rows, columns, threads,
                    [&](int64_t block, int64_t begin, int64_t end) { body(p, block, begin, end); });
  };
  if (dtype == "float16")
    launch_as(at_level<BalanceRows<float16>, Balance>(level));
  else
    with_float_type(op, "logits", dtype, [&](auto type) {
      launch_as(at_level<BalanceRows<typename decltype(type)::type>, Balance>(level));
    });
  if (p.wants_sums)
    add_partials(p.sums, blocks, columns, reinterpret_cast<float*>(sums), threads);
}

} // namespace
} // namespace dinov2_fast

void bind_sinkhorn_cpu(py::module_& m) {
  using namespace dinov2_fast;
  m.def("sinkhorn_columns_cpu", &sinkhorn_columns,
        "logits [R, K], log_v [R] -> largest of logits * scale + log_v and sums of exp relative to "
        "it, both [K]; pointers, sizes and row stride in elements.",
        py::arg("logits"), py::arg("log_v"), py::arg("largest"), py::arg("sums"), py::arg("rows"),
        py::arg("columns"), py::arg("row_stride"), py::arg("scale"), py::arg("dtype"),
        py::arg("threads"), py::arg("level"), py::call_guard<py::gil_scoped_release>());
  m.def("sinkhorn_rows_cpu", &sinkhorn_rows,
        "logits [R, K], log_u [K] -> lse [R] of logits * scale + log_u; pointers, sizes and row "
        "stride in elements.",
        py::arg("logits"), py::arg("log_u"), py::arg("lse"), py::arg("rows"), py::arg("columns"),
        py::arg("row_stride"), py::arg("scale"), py::arg("dtype"), py::arg("threads"),
        py::arg("level"), py::call_guard<py::gil_scoped_release>());
  m.def("sinkhorn_balance_cpu", &sinkhorn_balance,
        "logits [R, K], log_u [K], log_v [R] -> next_v [R], and unless null sums [K] of "
        "exp(logits * scale + log_u + next_v), over scratch [2, blocks, K].",
        py::arg("logits"), py::arg("log_u"), py::arg("log_v"), py::arg("next_v"), py::arg("sums"),
        py::arg("scratch"), py::arg("rows"), py::arg("columns"), py::arg("block_rows"),
        py::arg("row_stride"), py::arg("scale"), py::arg("dtype"), py::arg("threads"),
        py::arg("level"), py::call_guard<py::gil_scoped_release>());
}
