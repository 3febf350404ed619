// One small kernel for each instruction that the other programs do not execute. sm_90a.
#include <cstdint>

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// out [3, 64]: count, and, or of x > 0 over the CTA, by bar.red.
extern "C" __global__ void barrier_red_kernel(const int* x, int* out) {
  int count, all, any;
  asm volatile("{ .reg .pred p, q, r; setp.gt.s32 p, %3, 0;"
               "bar.red.popc.u32 %0, 1, p; bar.red.and.pred q, 2, p; bar.red.or.pred r, 3, 64, !p;"
               "selp.s32 %1, 1, 0, q; selp.s32 %2, 1, 0, r; }"
               : "=r"(count), "=r"(all), "=r"(any)
               : "r"(x[threadIdx.x]));
  out[threadIdx.x] = count;
  out[64 + threadIdx.x] = all;
  out[128 + threadIdx.x] = any;
}

// x [128, 4] -> out [128, 4] reversed: every thread's cp.async arrives at an mbarrier.
extern "C" __global__ void copy_arrival_kernel(const float4* x, float4* out, int noinc) {
  __shared__ float4 slot[128];
  __shared__ uint64_t barrier;
  const uint32_t at = shared_address(&barrier);
  if (threadIdx.x == 0)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(128));
  __syncthreads();
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(&slot[threadIdx.x])),
      "l"(x + threadIdx.x));
  if (noinc) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(at) : "memory");
  } else {
    asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(at) : "memory");
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
  }
  asm volatile("{\n.reg .pred done;\nAGAIN:\n"
               "mbarrier.test_wait.parity.shared::cta.b64 done, [%0], 0;\n"
               "@done bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(at)
               : "memory");
  out[threadIdx.x] = slot[127 - threadIdx.x];
}

// x [n bytes] -> out [n bytes] through shared memory by bulk copies without a tensor map.
extern "C" __global__ void bulk_kernel(const uint8_t* x, uint8_t* out, int n) {
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ uint64_t barrier;
  const uint32_t at = shared_address(&barrier), to = shared_address(memory);
  if (threadIdx.x)
    return;
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at));
  asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1; }" ::"r"(at),
               "r"(n)
               : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
               "[%3];" ::"r"(to),
               "l"(x), "r"(n), "r"(at)
               : "memory");
  asm volatile("{\n.reg .pred done;\nAGAIN:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
               "@!done bra AGAIN;\n}" ::"r"(at)
               : "memory");
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(out), "r"(to),
               "r"(n)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// sums [8] float, halves [4] f16x2, brains [4] bf16x2, words [6]: results of atomics.
extern "C" __global__ void atomics_kernel(float* sums, uint32_t* halves, uint32_t* brains,
                                          uint32_t* words, uint32_t* found) {
  const uint32_t t = threadIdx.x;
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums + t % 2 * 4), "f"(1.f),
               "f"(2.f), "f"(float(t)), "f"(0.5f));
  const uint32_t one_two_h = 0x40003c00, one_two_b = 0x40003f80;
  asm volatile("red.global.add.noftz.f16x2 [%0], %1;" ::"l"(halves + t % 4), "r"(one_two_h));
  asm volatile("red.global.add.noftz.bf16x2 [%0], %1;" ::"l"(brains + t % 4), "r"(one_two_b));
  asm volatile("red.global.max.u32 [%0], %1;" ::"l"(words), "r"(t * 7 % 31));
  asm volatile("red.global.xor.b32 [%0], %1;" ::"l"(words + 1), "r"(1u << t % 32));
  asm volatile("red.global.inc.u32 [%0], %1;" ::"l"(words + 2), "r"(9u));
  asm volatile("red.global.add.u64 [%0], %1;" ::"l"(words + 4), "l"(uint64_t(1) << 31));
  uint32_t before;
  asm volatile("atom.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(before)
               : "l"(words + 3), "r"(t), "r"(t + 1));
  found[t] = before;
  uint16_t h = 0x3c00; // 1.0
  asm volatile("{ .reg .b16 d; atom.global.add.noftz.f16 d, [%0], %1; }" ::"l"(words + 6), "h"(h));
}

// x [32] -> out [8, 32]: votes, matches, reductions and shuffles of a warp.
extern "C" __global__ void warp_kernel(const int* x, int* out) {
  const int t = threadIdx.x, v = x[t];
  int same = 0;
  out[t] = __ballot_sync(~0u, v & 1);
  out[32 + t] = __match_any_sync(~0u, v % 5);
  out[64 + t] = __match_all_sync(~0u, v / 1000, &same) + same;
  out[96 + t] = __reduce_max_sync(~0u, v);
  out[128 + t] = __reduce_xor_sync(~0u, unsigned(v));
  out[160 + t] = __shfl_up_sync(~0u, v, 3) + 1000 * __shfl_down_sync(~0u, v, 5, 16);
  out[192 + t] = __shfl_sync(~0u, v, t * 3, 8);
  out[224 + t] = __any_sync(~0u, v == 7) + 2 * __all_sync(~0u, v >= 0);
}

// x [8, 8] 16-bit -> out: transposed by movmatrix, and by stmatrix.trans.
extern "C" __global__ void transpose_kernel(const uint32_t* x, uint32_t* out) {
  __shared__ __align__(16) uint32_t tile[32];
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(x[threadIdx.x]));
  out[threadIdx.x] = d;
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(
                   shared_address(tile + (threadIdx.x < 8 ? threadIdx.x * 4 : 0))), // only 8 count
               "r"(x[threadIdx.x])
               : "memory");
  __syncwarp();
  out[32 + threadIdx.x] = tile[threadIdx.x];
}

// A table jump, and a thread's own array.
extern "C" __global__ void paths_kernel(const int* x, int* out) {
  int mine[8];
  for (int i = 0; i < 8; ++i)
    mine[i] = x[i] + threadIdx.x;
  int value;
  asm volatile("{\n.reg .u32 r;\nand.b32 r, %1, 3;\nTABLE: .branchtargets A, B, C, D;\n"
               "brx.idx r, TABLE;\nA: mov.s32 %0, 10; bra.uni END;\nB: mov.s32 %0, 20; bra END;\n"
               "C: mov.s32 %0, 30; bra END;\nD: mov.s32 %0, 40;\nEND:\n}"
               : "=r"(value)
               : "r"(threadIdx.x));
  out[threadIdx.x] = value + mine[x[threadIdx.x] & 7];
}

// x [128] -> out [64]: warp 0 stands at a barrier when the mbarrier it waited for moves on.
extern "C" __global__ void staggered_kernel(const int* x, int* out) {
  __shared__ uint64_t barrier;
  __shared__ int slot[32];
  const uint32_t at = shared_address(&barrier);
  if (threadIdx.x == 0)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at));
  __syncthreads();
  if (threadIdx.x < 32) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
                 "@!done bra AGAIN;\n}" ::"r"(at)
                 : "memory");
  } else {
    int sum = 0;
    for (int turn = 0; turn < 2; ++turn) {
#pragma unroll 1
      for (int i = turn; i < x[threadIdx.x]; i += 2)
        sum += x[i];
      if (threadIdx.x == 32)
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
    }
    slot[threadIdx.x - 32] = sum;
  }
  __syncthreads();
  out[threadIdx.x] = slot[threadIdx.x % 32];
}

// Half words: floats [2] bfloat16 sums, tickets [1] 16 bits taken one by one; found [32].
extern "C" __global__ void half_word_atomics_kernel(uint16_t* sums, uint16_t* ticket, int* found) {
  const uint32_t t = threadIdx.x;
  uint16_t taken;
  asm volatile("{ .reg .b16 d; atom.global.add.noftz.bf16 d, [%0], %1; }" ::"l"(sums + t % 2),
               "h"(uint16_t(0x3fc0))); // 1.5
  asm volatile("atom.global.cas.b16 %0, [%1], %2, %3;"
               : "=h"(taken)
               : "l"(ticket), "h"(uint16_t(t)), "h"(uint16_t(t + 1)));
  found[t] = taken;
}

// Vectors: sums [2] float, halves [8] half, brains [4] pairs of bfloat16; found [32, 2].
extern "C" __global__ void vector_atomics_kernel(float* sums, uint16_t* halves, uint32_t* brains,
                                                 float* found) {
  const uint32_t t = threadIdx.x, pair = 0x40003f80; // 1 and 2
  const uint16_t one = 0x3c00, two = 0x4000;
  asm volatile("atom.global.add.v2.f32 {%0, %1}, [%2], {%3, %4};"
               : "=f"(found[2 * t]), "=f"(found[2 * t + 1])
               : "l"(sums), "f"(1.f), "f"(float(t)));
  asm volatile("red.global.add.noftz.v8.f16 [%0], {%1, %2, %1, %2, %1, %2, %1, %2};" ::"l"(halves),
               "h"(one), "h"(two));
  asm volatile("red.global.add.noftz.v4.bf16x2 [%0], {%1, %1, %1, %1};" ::"l"(brains), "r"(pair));
}

// x [4, 32] -> out [4, 32]: two consumers each wait for one producer, at barriers of their own.
extern "C" __global__ void relay_kernel(const int* x, int* out) {
  __shared__ int slot[64];
  const int t = threadIdx.x, number = 1 + t / 32 % 2;
  if (t < 64) {
    slot[t] = x[t];
    asm volatile("bar.arrive %0, 64;" ::"r"(number) : "memory");
    out[t] = x[64 + t];
  } else {
    asm volatile("bar.sync %0, 64;" ::"r"(number) : "memory");
    out[t] = slot[t - 64 ^ 31];
  }
}

// a [16, 16] half, b [8, 16] half -> c [16, 8] half and once more with a half of K.
extern "C" __global__ void half_products_kernel(const uint32_t* a, const uint32_t* b, uint32_t* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4; // pairs of elements: 8 in a row of a and b
  const uint32_t a0 = a[g * 8 + t], a1 = a[(g + 8) * 8 + t], a2 = a[g * 8 + t + 4];
  const uint32_t a3 = a[(g + 8) * 8 + t + 4], b0 = b[g * 8 + t], b1 = b[g * 8 + t + 4];
  const uint32_t one = 0x3c003c00;
  uint32_t d0, d1, e0, e1;
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, "
               "{%6, %7}, {%8, %8};"
               : "=r"(d0), "=r"(d1)
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(one));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3}, {%4}, "
               "{%5, %5};"
               : "=r"(e0), "=r"(e1)
               : "r"(a0), "r"(a1), "r"(b0), "r"(one));
  c[g * 4 + t] = d0, c[(g + 8) * 4 + t] = d1;
  c[64 + g * 4 + t] = e0, c[64 + (g + 8) * 4 + t] = e1;
}
