// Several elements moved by one memory instruction, and their float values.
#pragma once

#include "cuda/device/types.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace dinov2_fast {

constexpr int kVectorBytes = 16;

// Elements of a vector that is moved in the narrower and in the wider of two types: the wider one
// fills 16 bytes, so that the lanes of a warp touch whole sectors in both.
template <typename A, typename B = A>
constexpr int kVectorOf = kVectorBytes / static_cast<int>(std::max(sizeof(A), sizeof(B)));

template <typename T, int N> struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

// The integers that carry a vector. An intrinsic moves them: left to itself the compiler takes some
// vector stores apart again.
template <typename T, int N> using Bits = std::conditional_t<sizeof(T) * N == 16, uint4, uint2>;

template <typename T, int N> constexpr void check_vector() {
  static_assert(N == 1 || sizeof(T) * N == 16 || sizeof(T) * N == 8,
                "a vector is 16 or 8 bytes, or one element");
}

// By the read-only path: the same kernel must not write what is loaded.
template <typename T, int N> __device__ Vector<T, N> load_vector(const T* from) {
  check_vector<T, N>();
  Vector<T, N> to;
  if constexpr (N == 1) {
    to.at[0] = *from;
  } else {
    const Bits<T, N> bits = __ldg(reinterpret_cast<const Bits<T, N>*>(from));
    memcpy(&to, &bits, sizeof(bits));
  }
  return to;
}

// For what the kernel writes too, as it does when it works in place.
template <typename T, int N> __device__ Vector<T, N> load_writable(const T* from) {
  check_vector<T, N>();
  Vector<T, N> to;
  if constexpr (N == 1) {
    to.at[0] = *from;
  } else {
    const Bits<T, N> bits = __ldca(reinterpret_cast<const Bits<T, N>*>(from));
    memcpy(&to, &bits, sizeof(bits));
  }
  return to;
}

template <typename T, int N> __device__ void store_vector(T* to, const Vector<T, N>& from) {
  check_vector<T, N>();
  if constexpr (N == 1) {
    *to = from.at[0];
  } else {
    Bits<T, N> bits;
    memcpy(&bits, &from, sizeof(bits));
    __stwb(reinterpret_cast<Bits<T, N>*>(to), bits);
  }
}

// As many floats as a vector has elements; where those are several, both sides start at multiples
// of 16 bytes.
template <int kVector> __device__ void copy_floats(float* to, const float* from) {
  constexpr int kStep = kVector % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int i = 0; i < kVector; i += kStep) {
    if constexpr (kStep == 4)
      *reinterpret_cast<float4*>(to + i) = *reinterpret_cast<const float4*>(from + i);
    else
      to[i] = from[i];
  }
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void from_float(float& to, float x) { to = x; }
__device__ inline void from_float(__half& to, float x) { to = __float2half_rn(x); }
__device__ inline void from_float(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// Half types keep 8 or 11 bits, so the fast exponential (2 ulp of float near 0) costs nothing.
template <typename T> __device__ float exponential(float x) {
  return std::is_same_v<T, float> ? expf(x) : __expf(x);
}

template <typename T, int N> __device__ void load_floats(const T* from, float (&to)[N]) {
  const auto loaded = load_vector<T, N>(from);
#pragma unroll
  for (int i = 0; i < N; ++i)
    to[i] = to_float(loaded.at[i]);
}

// The values of a vector of a matrix whose type only the call knows.
template <int N>
__device__ void load_floats(const void* matrix, FloatType type, int64_t at, float (&to)[N]) {
  if (type == FloatType::float32)
    load_floats(static_cast<const float*>(matrix) + at, to);
  else if (type == FloatType::float16)
    load_floats(static_cast<const __half*>(matrix) + at, to);
  else
    load_floats(static_cast<const __nv_bfloat16*>(matrix) + at, to);
}

// Whether all vectors of N elements of a matrix start at a multiple of their size, in every row.
template <typename T, int N> bool whole_vectors(const void* matrix, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(matrix) % (sizeof(T) * N) == 0 && row_stride % N == 0;
}

} // namespace dinov2_fast
