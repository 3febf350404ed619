// Sums and largest values over the lanes of a warp and the warps of a CTA, in one order for all.
#pragma once

#include <cstdint>

namespace dinov2_fast {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// The same bits in every lane: both partners of an exchange add the same two numbers.
template <typename T> __device__ T warp_sum(T x) {
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2)
    x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}

// NaN never wins.
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2)
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lane));
  return x;
}

struct Sum {
  template <typename T> __device__ static T of_warp(T x) { return warp_sum(x); }
  template <typename T> __device__ static T of_two(T a, T b) { return a + b; }
};

struct Max {
  __device__ static float of_warp(float x) { return warp_max(x); }
  __device__ static float of_two(float a, float b) { return fmaxf(a, b); }
};

// N values over the threads of a CTA, the same bits in each. Two calls need two buffers, or a
// barrier between them.
template <typename Reduction, typename T, int N>
__device__ void block_reduce(T (&x)[N], T (*of_warps)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    x[i] = Reduction::of_warp(x[i]);
  if (threadIdx.x % kLanes == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      of_warps[threadIdx.x / kLanes][i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i)
    x[i] = of_warps[0][i];
  for (unsigned warp = 1; warp < blockDim.x / kLanes; ++warp) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      x[i] = Reduction::of_two(x[i], of_warps[warp][i]);
  }
}

} // namespace dinov2_fast
