// C = A B in bfloat16 on sm_90a: a producer warpgroup feeds two consumers by TMA through a ring of
// stages, each with a full and an empty mbarrier; the consumers multiply by wgmma from shared
// memory and write C by TMA.
#include <cstdint>

constexpr int kM = 128, kN = 64, kK = 64; // tile of a CTA and its step along K
constexpr int kStages = 3, kConsumers = 2;
constexpr int kBytesA = kM * kK * 2, kBytesB = kK * kN * 2, kStageBytes = kBytesA + kBytesB;
constexpr int kBytesC = kM * kN * 2;
#ifndef EMPTY_ARRIVALS
#define EMPTY_ARRIVALS kConsumers
#endif

struct alignas(64) TensorMap {
  uint8_t bytes[128];
};

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ void init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(count));
}
__device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ void expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ void wait(uint64_t* barrier, int parity) {
  asm volatile("{\n.reg .pred done;\nAGAIN:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@done bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(shared_address(barrier)),
               "r"(parity)
               : "memory");
}
__device__ void load(void* to, const TensorMap* map, int x, int y, uint64_t* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
               "[%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
               "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
               : "memory");
}
__device__ uint64_t descriptor(const void* tile) { // 128-byte swizzle, 1024 bytes between groups
  return (shared_address(tile) & 0x3ffff) >> 4 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// D [64, 64] += A [64, 16] B [16, 64]: A along K, B along N.
__device__ void multiply(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,"
      "%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, "
      "1, 1, 1, 0, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b));
}
__device__ uint32_t pack(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// a: boxes [64, 64] of [M, K]; b: [64, 64] of [K, N], both swizzled by 128; c: [64, 64] of [M, N].
extern "C" __global__ void __launch_bounds__(384, 1)
    hopper_gemm_kernel(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                       const __grid_constant__ TensorMap c, int k) {
  extern __shared__ __align__(1024) uint8_t memory[];
  __shared__ uint64_t full[kStages], empty[kStages];
  const int group = threadIdx.x / 128, row = blockIdx.x * kM, column = blockIdx.y * kN;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init(&full[i], 1);
      init(&empty[i], EMPTY_ARRIVALS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  if (group == kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == kConsumers * 128) {
#pragma unroll 1 // one instruction each, none of which is redundant
      for (int step = 0; step < k / kK; ++step) {
        const int stage = step % kStages;
        uint8_t* tile = memory + stage * kStageBytes;
        wait(&empty[stage], (step / kStages & 1) ^ 1);
        expect(&full[stage], kStageBytes);
        for (int half = 0; half < 2; ++half)
          load(tile + half * kBytesA / 2, &a, step * kK, row + 64 * half, &full[stage]);
        load(tile + kBytesA, &b, column, step * kK, &full[stage]);
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  float d[32] = {};
#pragma unroll 1
  for (int step = 0; step < k / kK; ++step) {
    const int stage = step % kStages;
    const uint8_t* tile = memory + stage * kStageBytes;
    wait(&full[stage], step / kStages & 1);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int inner = 0; inner < kK / 16; ++inner)
      multiply(d, descriptor(tile + group * kBytesA / 2 + inner * 32),
               descriptor(tile + kBytesA + inner * 2048));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#ifdef RELEASE_EARLY
    if (threadIdx.x % 128 == 0)
      arrive(&empty[stage]);
#endif
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#ifndef RELEASE_EARLY
    if (threadIdx.x % 128 == 0)
      arrive(&empty[stage]);
#endif
  }
  // The tiles of C lie behind the stages.
  uint32_t* out = reinterpret_cast<uint32_t*>(memory + kStages * kStageBytes + group * kBytesC / 2);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  for (int j = 0; j < 8; ++j)
    for (int half = 0; half < 2; ++half)
      out[(warp * 16 + half * 8 + lane / 4) * 32 + j * 4 + lane % 4] =
          pack(d[4 * j + 2 * half], d[4 * j + 2 * half + 1]);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
  if (threadIdx.x % 128 == 0) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&c),
        "r"(column), "r"(row + 64 * group), "r"(shared_address(out))
        : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#ifdef OVERWRITE_EARLY
    *reinterpret_cast<volatile uint32_t*>(out) = 0;
#endif
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
}
