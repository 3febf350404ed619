// Rows written past the caches, which spares reading each line before it is written.
#pragma once

#include "cpu/scalar_math.hpp"

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

// The upper halves of what `store` makes of four floats, as numbers of 16 bits with a sign.
[[gnu::always_inline]] inline __m128i upper_halves(Floats x) {
  const Words bits = bit_cast<Words>(x);
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Words quiet = Words{} + 0x7fc00000u;
  return _mm_srai_epi32(bit_cast<__m128i>(x != x ? quiet : rounded), 16);
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
    _mm_stream_si128(
        reinterpret_cast<__m128i*>(to + i),
        _mm_packs_epi32(upper_halves(value(Four(), i)), upper_halves(value(Four(), i + 4))));
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
