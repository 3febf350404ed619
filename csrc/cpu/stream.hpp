// Rows written past the caches, which spares reading each line before it is written.
#pragma once

#include "cpu/rows.hpp"
#include "cpu/scalar_math.hpp"

#include <algorithm>
#include <cstdint>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace dinov2_fast {

// Whether an output is worth it: one of this size has left a core's own cache before another kernel
// reads it.
template <typename T> bool streams(int64_t rows, int64_t width) {
  constexpr int64_t kLeastBytes = 1 << 20;
  return rows * width * static_cast<int64_t>(sizeof(T)) >= kLeastBytes;
}

// How `put_row` takes the elements of vectors: one of them, or, below, four at once.
struct One {
  template <typename T>
  [[gnu::always_inline]] inline float operator()(const T* vector, int64_t i) const {
    return load(vector[i]);
  }
  [[gnu::always_inline]] inline void add(float* to, int64_t i, float x) const { to[i] += x; }
};

#if defined(__SSE2__)
using Floats = float __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(16)));

struct Four {
  [[gnu::always_inline]] inline Floats operator()(const float* vector, int64_t i) const {
    return _mm_loadu_ps(vector + i);
  }
  [[gnu::always_inline]] inline Floats operator()(const bfloat16* vector, int64_t i) const {
    const __m128i four = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(vector + i));
    return bit_cast<Floats>(_mm_unpacklo_epi16(_mm_setzero_si128(), four));
  }
  [[gnu::always_inline]] inline void add(float* to, int64_t i, Floats x) const {
    _mm_storeu_ps(to + i, _mm_loadu_ps(to + i) + x);
  }
};

// The upper halves of four floats rounded to nearest, ties to even, as numbers of 16 bits with a
// sign; of no NaN. An odd one rounds half up; an even one misses that by the smallest number.
// Compared, not shifted as in `store`: some processors shift in the one unit that has sums of
// floats to do too.
[[gnu::always_inline]] inline __m128i upper_halves(Floats x) {
  const Words bits = bit_cast<Words>(x);
  const auto less_if_even = bit_cast<Words>((bits & 0x10000u) == 0u);
  return _mm_srai_epi32(bit_cast<__m128i>(bits + (less_if_even + 0x8000u)), 16);
}

// What `store` makes of eight floats among which are NaNs: apart from the loops, which meet none.
[[gnu::noinline, gnu::cold]] inline __m128i round_with_nans(Floats low, Floats high) {
  alignas(16) bfloat16 to[8];
  for (int i = 0; i < 4; ++i) {
    store(to[i], low[i]);
    store(to[4 + i], high[i]);
  }
  return _mm_load_si128(reinterpret_cast<const __m128i*>(to));
}

// What `store` makes of eight floats.
[[gnu::always_inline]] inline __m128i round_to_bfloat16(Floats low, Floats high) {
  if (__builtin_expect(_mm_movemask_ps(_mm_cmpunord_ps(low, high)) != 0, 0))
    return round_with_nans(low, high);
  return _mm_packs_epi32(upper_halves(low), upper_halves(high));
}

// Vectors of value(Four, i), past the caches; how many elements those are.
template <typename Value>
[[gnu::always_inline]] inline int64_t stream_row(float* to, int64_t count, const Value& value) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    _mm_stream_ps(to + i, value(Four(), i));
  return i;
}

template <typename Value>
[[gnu::always_inline]] inline int64_t stream_row(bfloat16* to, int64_t count, const Value& value) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     round_to_bfloat16(value(Four(), i), value(Four(), i + 4)));
  return i;
}
#endif

// to[i] = value(at, i), past the caches if asked for and where vectors of 16 bytes are aligned;
// value reads every vector as at(vector, i).
template <typename T, typename Value>
[[gnu::always_inline]] inline void put_row(T* to, int64_t count, bool stream, const Value& value) {
  int64_t done = 0;
#if defined(__SSE2__)
  if (stream && reinterpret_cast<uintptr_t>(to) % 16 == 0)
    done = stream_row(to, count, value);
#else
  (void)stream;
#endif
#pragma omp simd
  for (int64_t i = done; i < count; ++i)
    store(to[i], value(One(), i));
}

// The same in parts, between which those of a row that is needed soon are asked for: more lines at
// once than a processor has on their way hold up what it could compute meanwhile.
template <typename T, typename Next, typename Value>
[[gnu::always_inline]] inline void put_row(T* to, int64_t count, bool stream, const Next* next,
                                           const Value& value) {
  constexpr int64_t kPart = 64;
  for (int64_t from = 0; from < count; from += kPart) {
    const int64_t part = std::min(count - from, kPart);
    prefetch_row(next + from, part);
    put_row(to + from, part, stream,
            [&](auto at, int64_t i) __attribute__((always_inline)) { return value(at, from + i); });
  }
}

// After the last row of a thread: what was written past the caches is there for every other one.
[[gnu::always_inline]] inline void finish_streams(bool stream) {
#if defined(__SSE2__)
  if (stream)
    _mm_sfence();
#else
  (void)stream;
#endif
}

} // namespace dinov2_fast
