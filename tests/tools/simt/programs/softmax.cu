// Softmax of rows: shuffles within a warp, shared memory between warps.
constexpr int kThreads = 128;

__device__ float reduce(float value, float* partial, bool maximum) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 16; step; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffff, value, step);
    value = maximum ? fmaxf(value, other) : value + other;
  }
  if (lane == 0)
    partial[warp] = value;
  __syncthreads();
  float whole = partial[0];
  for (int i = 1; i < kThreads / 32; ++i)
    whole = maximum ? fmaxf(whole, partial[i]) : whole + partial[i];
  return whole;
}

// x [R, n] -> out [R, n]; one CTA a row.
extern "C" __global__ void softmax_kernel(const float* x, float* out, int n) {
  __shared__ float partial[kThreads / 32];
  x += blockIdx.x * static_cast<long long>(n);
  out += blockIdx.x * static_cast<long long>(n);
  float largest = -INFINITY;
#ifdef READ_PAST_THE_END
  for (int i = threadIdx.x; i <= n; i += kThreads)
#else
  for (int i = threadIdx.x; i < n; i += kThreads)
#endif
    largest = fmaxf(largest, x[i]);
  largest = reduce(largest, partial, true);
  __syncthreads();
  float total = 0;
  for (int i = threadIdx.x; i < n; i += kThreads)
    total += expf(x[i] - largest);
  total = reduce(total, partial, false);
  for (int i = threadIdx.x; i < n; i += kThreads)
    out[i] = expf(x[i] - largest) / total;
}
