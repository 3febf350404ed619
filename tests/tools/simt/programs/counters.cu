// Accesses whose cost is known.
extern "C" __global__ void shared_store_kernel(float* out, int stride) {
  __shared__ float tile[33 * 32];
  tile[threadIdx.x * stride] = 1.0f;
  __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x * stride];
}

extern "C" __global__ void shared_vector_kernel(float4* out) {
  __shared__ float4 tile[32];
  tile[threadIdx.x] = make_float4(1, 2, 3, 4);
  __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x];
}

extern "C" __global__ void global_load_kernel(const float* x, float* out, int stride) {
  out[threadIdx.x] = x[threadIdx.x * stride];
}
