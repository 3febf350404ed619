// C = A B in bfloat16: two stages of cp.async, ldmatrix, mma.sync.
#include <cstdint>

constexpr int kM = 64, kN = 64, kK = 32;      // tile of a CTA, and its step along K
constexpr int kWarps = 4;                     // 2 x 2, each 32 x 32 of C
constexpr int kPadA = kK + 8, kPadB = kN + 8; // rows 16 bytes longer: no bank conflicts

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from));
}

__device__ void load4(uint32_t (&r)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(from)));
}

__device__ void load4_transposed(uint32_t (&r)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(from)));
}

__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
               "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a [M, K], b [K, N] in bfloat16 -> c [M, N]; M, N, K are multiples of the tile.
extern "C" __global__ void gemm_kernel(const uint16_t* a, const uint16_t* b, float* c, int n,
                                       int k) {
  __shared__ __align__(16) uint16_t tile_a[2][kM][kPadA];
  __shared__ __align__(16) uint16_t tile_b[2][kK][kPadB];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = blockIdx.x * kM, column = blockIdx.y * kN;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;

  const auto load = [&](int stage, int begin) {
    for (int i = threadIdx.x; i < kM * kK / 8; i += kWarps * 32)
      copy16(&tile_a[stage][i / (kK / 8)][i % (kK / 8) * 8],
             a + static_cast<int64_t>(row + i / (kK / 8)) * k + begin + i % (kK / 8) * 8);
    for (int i = threadIdx.x; i < kK * kN / 8; i += kWarps * 32)
      copy16(&tile_b[stage][i / (kN / 8)][i % (kN / 8) * 8],
             b + static_cast<int64_t>(begin + i / (kN / 8)) * n + column + i % (kN / 8) * 8);
    asm volatile("cp.async.commit_group;");
  };

  float total[2][4][4] = {};
  load(0, 0);
  for (int begin = 0; begin < k; begin += kK) {
    const int stage = begin / kK % 2;
    if (begin + kK < k) {
      load(stage ^ 1, begin + kK);
      asm volatile("cp.async.wait_group 1;");
    } else {
      asm volatile("cp.async.wait_group 0;");
    }
    __syncthreads();
    for (int step = 0; step < kK; step += 16) {
      uint32_t left[2][4], right[2][4];
      for (int i = 0; i < 2; ++i) {
        load4(left[i], &tile_a[stage][warp_row + 16 * i + lane % 16][step + lane / 16 * 8]);
        load4_transposed(right[i],
                         &tile_b[stage][step + lane % 16][warp_column + 16 * i + lane / 16 * 8]);
      }
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j)
          multiply(total[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
    }
    __syncthreads();
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j)
      for (int h = 0; h < 4; ++h)
        c[static_cast<int64_t>(row + warp_row + 16 * i + lane / 4 + h / 2 * 8) * n + column +
          warp_column + 8 * j + lane % 4 * 2 + h % 2] = total[i][j][h];
}
