// A thread may read what its own cp.async has brought; its neighbours need __syncwarp.
#include <cstdint>

// x [n, 4] -> out [n, 4]: every thread copies its own four numbers, or its neighbour's.
extern "C" __global__ void handover_kernel(const float4* x, float4* out) {
  __shared__ float4 slot[64];
  const int at = blockIdx.x * 64 + threadIdx.x;
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(&slot[threadIdx.x]));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(x + at));
  asm volatile("cp.async.commit_group;");
  asm volatile("cp.async.wait_group 0;" ::: "memory");
#ifdef NEIGHBOUR
  out[at] = slot[threadIdx.x ^ 1];
#else
  out[at] = slot[threadIdx.x];
#endif
}
