// What kernels on some rows of a matrix share: row numbers, float types, sums over rows.
#pragma once

#include "check.hpp"
#include "cpu/level.hpp"
#include "cpu/parallel.hpp"
#include "cpu/scalar_math.hpp"

#include <algorithm>
#include <cstdint>
#include <string>

namespace dinov2_fast {

template <typename T> struct FloatType {
  using type = T;
};

// Calls body(FloatType<T>) for the type of that name.
template <typename Body>
void with_float_type(const char* op, const char* name, const std::string& dtype, const Body& body) {
  if (dtype == "float32")
    body(FloatType<float>());
  else if (dtype == "bfloat16")
    body(FloatType<bfloat16>());
  else
    refuse(op, std::string(name) + " must be float32 or bfloat16, got " + dtype);
}

// Kernel::run(p, block, first row, end row) on the instruction set of each level. Kernel::run is
// always inlined, so that its loops take on the target of these wrappers.
template <typename Kernel, typename P>
void run_baseline(const P& p, int64_t block, int64_t begin, int64_t end) {
  Kernel::run(p, block, begin, end);
}

#if defined(__x86_64__)
template <typename Kernel, typename P>
[[gnu::target("avx2,fma")]] void run_avx2(const P& p, int64_t block, int64_t begin, int64_t end) {
  Kernel::run(p, block, begin, end);
}

template <typename Kernel, typename P>
[[gnu::target("avx512f,avx512bw,avx512dq,avx512vl,fma")]] void
run_avx512(const P& p, int64_t block, int64_t begin, int64_t end) {
  Kernel::run(p, block, begin, end);
}
#endif

template <typename Kernel, typename P> auto at_level(Level level) {
  auto* run = run_baseline<Kernel, P>;
#if defined(__x86_64__)
  if (level == Level::avx2)
    run = run_avx2<Kernel, P>;
  if (level >= Level::avx512)
    run = run_avx512<Kernel, P>;
#else
  (void)level;
#endif
  return run;
}

// Row number i of a selection; without one, every row is selected.
[[gnu::always_inline]] inline int64_t selected(const int64_t* rows, int64_t i) {
  return rows == nullptr ? i : rows[i];
}

// Asks for a row that is needed soon: selected rows follow each other in no way that a processor
// could guess, and its own guesses end at every page.
template <typename T> [[gnu::always_inline]] inline void prefetch_row(const T* row, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine)
    __builtin_prefetch(row + i);
}

// Refuses row numbers outside [low, high), in one pass without branches; low is 0 or -1. Neither
// a traced program nor the caller looks at the numbers, so kernels do before they write anywhere.
inline void require_within(const char* op, const char* name, const int64_t* numbers, int64_t count,
                           int64_t low, int64_t high) {
  uint64_t outside = 0; // a number outside sets the sign bit
#pragma omp simd reduction(| : outside)
  for (int64_t i = 0; i < count; ++i) {
    const auto number = static_cast<uint64_t>(numbers[i]);
    outside |= (number - static_cast<uint64_t>(low)) | (static_cast<uint64_t>(high - 1) - number);
  }
  if (outside >> 63 == 0)
    return;
  const auto [least, most] = std::minmax_element(numbers, numbers + count);
  refuse(op, std::string(name) + " must be in [" + std::to_string(low) + ", " +
                 std::to_string(high) + "), got " + std::to_string(*least) + " to " +
                 std::to_string(*most));
}

inline void require_rows(const char* op, const int64_t* rows, int64_t num_rows, int64_t available) {
  require_not_negative(op, "num_rows", num_rows);
  if (rows != nullptr)
    require_within(op, "rows", rows, num_rows, 0, available);
  else if (num_rows > available)
    refuse(op, "num_rows must be at most " + std::to_string(available) + ", got " +
                   std::to_string(num_rows));
}

inline void require_numbers(const char* op, int64_t channels, int threads, int64_t block_rows = 1) {
  require_positive(op, "channels", channels);
  require_positive(op, "threads", threads);
  require_positive(op, "block_rows", block_rows);
}

inline void require_vector(const char* op, const char* name, const void* pointer, int64_t size) {
  if (size > 0)
    require_pointer(op, name, pointer);
}

inline int64_t blocks_of(int64_t num_rows, int64_t block_rows) {
  return (num_rows + block_rows - 1) / block_rows;
}

// Blocks of rows over threads: the blocks, and so the order of every sum, are the same for any
// number of threads. Calls body(block, first row, end row).
template <typename Body>
void parallel_blocks(int64_t num_rows, int64_t block_rows, int64_t width, int threads,
                     const Body& body) {
  const int64_t blocks = blocks_of(num_rows, block_rows);
  parallel_rows(blocks, block_rows * width, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      body(block, block * block_rows, std::min((block + 1) * block_rows, num_rows));
  });
}

// sums[c] = partials[0][c] + partials[1][c] + ... in this order.
inline void add_partials(const float* partials, int64_t blocks, int64_t width, float* sums,
                         int threads) {
  parallel_rows(width, blocks, threads, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      sums[c] = 0.0f;
    for (int64_t block = 0; block < blocks; ++block) {
      const float* __restrict part = partials + block * width;
      float* __restrict total = sums;
#pragma omp simd
      for (int64_t c = begin; c < end; ++c)
        total[c] += part[c];
    }
  });
}

} // namespace dinov2_fast
