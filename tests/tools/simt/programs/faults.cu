// One small kernel for each fault that no larger program can have. sm_90a.
#include <cstdint>

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// x [32, 4] -> nothing: the kernel ends with its copies on their way.
extern "C" __global__ void leaving_copy_kernel(const float4* x) {
  __shared__ float4 slot[32];
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(&slot[threadIdx.x])),
      "l"(x + threadIdx.x));
  asm volatile("cp.async.commit_group;");
}

// x [512 bytes] -> nothing: nobody waits for the mbarrier.
extern "C" __global__ void leaving_load_kernel(const uint8_t* x) {
  __shared__ __align__(128) uint8_t memory[512];
  __shared__ uint64_t barrier;
  const uint32_t at = shared_address(&barrier);
  if (threadIdx.x)
    return;
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 512;" ::"r"(at) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 512, "
               "[%2];" ::"r"(shared_address(memory)),
               "l"(x), "r"(at)
               : "memory");
}

// out [32] float4: the kernel ends before its bulk store has read shared memory.
extern "C" __global__ void leaving_store_kernel(float4* out) {
  __shared__ __align__(128) float4 slot[32];
  slot[threadIdx.x] = float4{1, 2, 3, 4};
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if (threadIdx.x)
    return;
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 512;" ::"l"(out),
               "r"(shared_address(slot))
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// out [32]: lanes store different numbers to one place at once.
extern "C" __global__ void two_values_kernel(int* out) {
  __shared__ int slot[2];
  *const_cast<volatile int*>(&slot[threadIdx.x / 16]) = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = slot[threadIdx.x / 16];
}

// out [32]: an mbarrier that is initialised where there is one.
extern "C" __global__ void twice_kernel(int* out) {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; ++i)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier)));
  out[threadIdx.x] = 1;
}

// out [32]: an arrival at what is no mbarrier.
extern "C" __global__ void never_kernel(int* out) {
  __shared__ uint64_t barrier;
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)));
  out[threadIdx.x] = 1;
}

// out [32]: a form of an instruction that the interpreter does not know, but only where x > 0.
extern "C" __global__ void unknown_kernel(int* out, int x) {
  uint32_t count = 0;
  if (x > 0)
    asm volatile("mbarrier.pending_count.b64 %0, %1;" : "=r"(count) : "l"(uint64_t(x)));
  out[threadIdx.x] = count;
}
