// One wgmma on tiles of any layout. sm_90a.
#include <cstdint>

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// D [64, 16] = A B with tiles as the host has laid them out; descriptors come as arguments.
extern "C" __global__ void wgmma_kernel(const uint4* image, int num_vectors, uint64_t a, uint64_t b,
                                        float* out) {
  extern __shared__ __align__(1024) uint4 memory[];
  for (int i = threadIdx.x; i < num_vectors; i += 128)
    memory[i] = image[i];
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  const uint64_t start = (shared_address(memory) & 0x3ffff) >> 4;
  float d[8] = {};
  for (float& one : d)
    asm volatile("" : "+f"(one)::"memory"); // zeroed before the fence, not after it
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7}, "
               "%8, %9, 1, 1, 1, %10, %11;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
                 "+f"(d[7])
               : "l"(a + start), "l"(b + start), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  for (int j = 0; j < 8; ++j)
    out[(row + j / 2 % 2 * 8) * 16 + j / 4 * 8 + threadIdx.x % 4 * 2 + j % 2] = d[j];
}
