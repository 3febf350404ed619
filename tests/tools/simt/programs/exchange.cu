// Lanes of a warp hand values to each other through shared memory; the last warp sums up with the
// help of an atomic, and the last CTA of the grid with the help of another.
constexpr int kThreads = 64;

// x [n] -> reversed [n] within every warp, sums [CTAs], total [1]; counter [1] begins as 0.
extern "C" __global__ void exchange_kernel(const int* x, int* reversed, int* sums, int* total,
                                           unsigned* counter) {
  __shared__ int slot[kThreads];
  __shared__ int sum;
  const int at = blockIdx.x * kThreads + threadIdx.x, lane = threadIdx.x % 32;
  if (threadIdx.x == 0)
    sum = 0;
  slot[threadIdx.x] = x[at];
#ifdef UNINITIALISED
  const int beyond = slot[(threadIdx.x + 32) % kThreads];
  reversed[at] = beyond;
#endif
  __syncwarp();
  reversed[at] = slot[threadIdx.x - lane + 31 - lane];
  __syncthreads();
  atomicAdd(&sum, x[at]);
  __syncthreads();
  if (threadIdx.x)
    return;
  sums[blockIdx.x] = sum;
#ifndef WITHOUT_THE_COUNTER
  __threadfence();
  if (atomicAdd(counter, 1) != gridDim.x - 1)
    return;
  __threadfence();
#else
  if (blockIdx.x != gridDim.x - 1)
    return;
#endif
  int all = 0;
  for (int i = 0; i < gridDim.x; ++i)
    all += sums[i];
  *total = all;
}

// Half a warp calls a collective that names all of it.
extern "C" __global__ void diverging_kernel(int* out) {
  if (threadIdx.x % 32 < 16)
    out[threadIdx.x] = __shfl_xor_sync(0xffffffff, threadIdx.x, 1);
}

// Only some warps come to a barrier of all.
extern "C" __global__ void deserting_kernel(int* out) {
  if (threadIdx.x < 32)
    asm volatile("bar.sync 1, 64;");
  out[threadIdx.x] = 1;
}
