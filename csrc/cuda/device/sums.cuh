// Sums over the lanes of a warp and over the threads of a CTA, in a fixed order.
#pragma once

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

// The same bits in every thread; of_warps has room for one number a warp and is free to use.
template <typename T> __device__ T block_sum(T x, T* of_warps) {
  x = warp_sum(x);
  if (threadIdx.x % kLanes == 0)
    of_warps[threadIdx.x / kLanes] = x;
  __syncthreads();
  T sum{};
  for (unsigned warp = 0; warp < blockDim.x / kLanes; ++warp)
    sum += of_warps[warp];
  return sum;
}

} // namespace dinov2_fast
