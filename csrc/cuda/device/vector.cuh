// Several elements moved by one memory instruction, and their float values.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

namespace dinov2_fast {

template <typename T, int N> struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

// 16 bytes travel by an intrinsic: left to itself the compiler takes some vector stores apart
// again. What is loaded must not be written by the same kernel (read-only path).
template <typename T, int N> __device__ Vector<T, N> load_vector(const T* from) {
  static_assert(sizeof(T) * N == sizeof(uint4) || N == 1, "a vector is 16 bytes or one element");
  Vector<T, N> to;
  if constexpr (N == 1) {
    to.at[0] = *from;
  } else {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
    memcpy(&to, &bits, sizeof(bits));
  }
  return to;
}

template <typename T, int N> __device__ void store_vector(T* to, const Vector<T, N>& from) {
  static_assert(sizeof(T) * N == sizeof(uint4) || N == 1, "a vector is 16 bytes or one element");
  if constexpr (N == 1) {
    *to = from.at[0];
  } else {
    uint4 bits;
    memcpy(&bits, &from, sizeof(bits));
    __stwb(reinterpret_cast<uint4*>(to), bits);
  }
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void from_float(float& to, float x) { to = x; }
__device__ inline void from_float(__half& to, float x) { to = __float2half_rn(x); }
__device__ inline void from_float(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

} // namespace dinov2_fast
