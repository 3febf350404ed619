// Expressions that nvcc and g++ both compile: what the interpreter computes must be what x86 does.
// Intrinsics and inline PTX have a plain C++ twin for the host.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i32 = int32_t;
using i64 = int64_t;

#ifdef __CUDACC__
#define FN __device__ __forceinline__
#else
#include <algorithm>
#include <cfenv>
#define FN static __attribute__((noinline))
#endif

template <typename To, typename From> FN To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

#ifdef __CUDACC__
#include <cuda_fp16.h>

#define ASM1(NAME, RESULT, OUT, TEXT, A, IN)                                                       \
  FN RESULT NAME(A a) {                                                                            \
    RESULT d;                                                                                      \
    asm volatile(TEXT : OUT(d) : IN(a));                                                           \
    return d;                                                                                      \
  }
#define ASM2(NAME, RESULT, OUT, TEXT, A, IN)                                                       \
  FN RESULT NAME(A a, A b) {                                                                       \
    RESULT d;                                                                                      \
    asm volatile(TEXT : OUT(d) : IN(a), IN(b));                                                    \
    return d;                                                                                      \
  }
#define ASM3(NAME, RESULT, OUT, TEXT, A, IN)                                                       \
  FN RESULT NAME(A a, A b, A c) {                                                                  \
    RESULT d;                                                                                      \
    asm volatile(TEXT : OUT(d) : IN(a), IN(b), IN(c));                                             \
    return d;                                                                                      \
  }
#define COMPARE(NAME, WHAT)                                                                        \
  FN u32 NAME(float a, float b) {                                                                  \
    u32 d;                                                                                         \
    asm volatile("{ .reg .pred p; setp." WHAT ".f32 p, %1, %2; selp.u32 %0, 1, 0, p; }"            \
                 : "=r"(d)                                                                         \
                 : "f"(a), "f"(b));                                                                \
    return d;                                                                                      \
  }

COMPARE(setp_ne, "ne")
COMPARE(setp_equ, "equ")
COMPARE(setp_ltu, "ltu")
COMPARE(setp_geu, "geu")
COMPARE(setp_num, "num")
COMPARE(setp_nan, "nan")
ASM2(min_nan, float, "=f", "min.NaN.f32 %0, %1, %2;", float, "f")
ASM2(max_nan, float, "=f", "max.NaN.f32 %0, %1, %2;", float, "f")
ASM2(min_plain, float, "=f", "min.f32 %0, %1, %2;", float, "f")
ASM2(max_plain, float, "=f", "max.f32 %0, %1, %2;", float, "f")
ASM2(add_ftz, float, "=f", "add.ftz.f32 %0, %1, %2;", float, "f")
ASM2(mul_ftz, float, "=f", "mul.ftz.f32 %0, %1, %2;", float, "f")
ASM3(fma_ftz, float, "=f", "fma.rn.ftz.f32 %0, %1, %2, %3;", float, "f")
ASM3(fma_sat, float, "=f", "fma.rn.sat.f32 %0, %1, %2, %3;", float, "f")
ASM2(add_sat, float, "=f", "add.sat.f32 %0, %1, %2;", float, "f")
ASM2(copysign_ptx, float, "=f", "copysign.f32 %0, %1, %2;", float, "f")
ASM2(add_sat_s32, i32, "=r", "add.sat.s32 %0, %1, %2;", i32, "r")
ASM2(sub_sat_s32, i32, "=r", "sub.sat.s32 %0, %1, %2;", i32, "r")
ASM3(bfe_u32, u32, "=r", "bfe.u32 %0, %1, %2, %3;", u32, "r")
ASM3(bfe_s32, i32, "=r", "bfe.s32 %0, %1, %2, %3;", i32, "r")
ASM3(shf_l_clamp, u32, "=r", "shf.l.clamp.b32 %0, %1, %2, %3;", u32, "r")
ASM3(shf_r_clamp, u32, "=r", "shf.r.clamp.b32 %0, %1, %2, %3;", u32, "r")
ASM3(shf_l_wrap, u32, "=r", "shf.l.wrap.b32 %0, %1, %2, %3;", u32, "r")
ASM3(shf_r_wrap, u32, "=r", "shf.r.wrap.b32 %0, %1, %2, %3;", u32, "r")
ASM3(prmt_f4e, u32, "=r", "prmt.b32.f4e %0, %1, %2, %3;", u32, "r")
ASM3(prmt_b4e, u32, "=r", "prmt.b32.b4e %0, %1, %2, %3;", u32, "r")
ASM3(prmt_rc8, u32, "=r", "prmt.b32.rc8 %0, %1, %2, %3;", u32, "r")
ASM3(prmt_ecl, u32, "=r", "prmt.b32.ecl %0, %1, %2, %3;", u32, "r")
ASM3(prmt_ecr, u32, "=r", "prmt.b32.ecr %0, %1, %2, %3;", u32, "r")
ASM3(prmt_rc16, u32, "=r", "prmt.b32.rc16 %0, %1, %2, %3;", u32, "r")
ASM3(prmt_any, u32, "=r", "prmt.b32 %0, %1, %2, %3;", u32, "r")
ASM3(lop3_96, u32, "=r", "lop3.b32 %0, %1, %2, %3, 0x96;", u32, "r")
ASM3(lop3_e8, u32, "=r", "lop3.b32 %0, %1, %2, %3, 0xe8;", u32, "r")
ASM3(lop3_1b, u32, "=r", "lop3.b32 %0, %1, %2, %3, 0x1b;", u32, "r")
ASM2(shl_b32, u32, "=r", "shl.b32 %0, %1, %2;", u32, "r")
ASM2(shr_u32, u32, "=r", "shr.u32 %0, %1, %2;", u32, "r")
ASM2(shr_s32, i32, "=r", "shr.s32 %0, %1, %2;", i32, "r")
ASM1(bfind_u32, u32, "=r", "bfind.u32 %0, %1;", u32, "r")
ASM1(bfind_s32, u32, "=r", "bfind.s32 %0, %1;", i32, "r")
ASM1(bfind_shift, u32, "=r", "bfind.shiftamt.u32 %0, %1;", u32, "r")
ASM1(cnot, u32, "=r", "cnot.b32 %0, %1;", u32, "r")
ASM1(tf32_rna, u32, "=r", "cvt.rna.tf32.f32 %0, %1;", float, "f")
ASM1(cvt_sat, float, "=f", "cvt.sat.f32.f32 %0, %1;", float, "f")
ASM1(cvt_rni, float, "=f", "cvt.rni.f32.f32 %0, %1;", float, "f")
ASM1(sat_s8, i32, "=r", "{ .reg .s16 t; cvt.sat.s8.s32 t, %1; cvt.s32.s8 %0, t; }", i32, "r")
ASM1(sat_u16, u32, "=r", "{ .reg .u16 t; cvt.sat.u16.s32 t, %1; cvt.u32.u16 %0, t; }", i32, "r")
ASM2(bf16x2, u32, "=r", "cvt.rn.bf16x2.f32 %0, %1, %2;", float, "f")
ASM2(bf16x2_rz, u32, "=r", "cvt.rz.bf16x2.f32 %0, %1, %2;", float, "f")
ASM2(bf16x2_relu, u32, "=r", "cvt.rn.relu.bf16x2.f32 %0, %1, %2;", float, "f")
ASM2(f16x2, u32, "=r", "cvt.rn.f16x2.f32 %0, %1, %2;", float, "f")
ASM3(slct, i32, "=r", "slct.s32.s32 %0, %1, %2, %3;", i32, "r")
ASM2(f16x2_add, u32, "=r", "add.rn.f16x2 %0, %1, %2;", u32, "r")
ASM2(f16x2_mul, u32, "=r", "mul.rn.f16x2 %0, %1, %2;", u32, "r")
ASM3(f16x2_fma, u32, "=r", "fma.rn.f16x2 %0, %1, %2, %3;", u32, "r")
ASM3(bf16x2_fma, u32, "=r", "fma.rn.bf16x2 %0, %1, %2, %3;", u32, "r")
ASM2(bf16x2_max, u32, "=r", "max.bf16x2 %0, %1, %2;", u32, "r")
ASM1(bf16x2_neg, u32, "=r", "neg.bf16x2 %0, %1;", u32, "r")
ASM1(testp_normal, u32, "=r", "{ .reg .pred p; testp.normal.f32 p, %1; selp.u32 %0, 1, 0, p; }",
     float, "f")
ASM1(testp_subnormal, u32, "=r",
     "{ .reg .pred p; testp.subnormal.f32 p, %1; selp.u32 %0, 1, 0, p; }", float, "f")
ASM2(set_f32, float, "=f", "set.gt.f32.s32 %0, %1, %2;", i32, "r")
ASM2(set_u32, u32, "=r", "set.leu.u32.f32 %0, %1, %2;", float, "f")
ASM3(mad_hi, i32, "=r", "mad.hi.s32 %0, %1, %2, %3;", i32, "r")
ASM3(dp4a_su, i32, "=r", "dp4a.s32.u32 %0, %1, %2, %3;", i32, "r")

FN u64 bfi(u64 a, u64 b, u32 at, u32 count) {
  u64 d;
  asm volatile("bfi.b64 %0, %1, %2, %3, %4;" : "=l"(d) : "l"(a), "l"(b), "r"(at), "r"(count));
  return d;
}
FN u32 bfi32(u32 a, u32 b, u32 at, u32 count) {
  u32 d;
  asm volatile("bfi.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(at), "r"(count));
  return d;
}
FN i64 bfe_s64(i64 a, u32 at, u32 count) {
  i64 d;
  asm volatile("bfe.s64 %0, %1, %2, %3;" : "=l"(d) : "l"(a), "r"(at), "r"(count));
  return d;
}
FN u64 add_carry(u64 a, u64 b) {
  u64 d;
  asm volatile("{ .reg .u32 a, b, c, d, e, f; mov.b64 {a, b}, %1; mov.b64 {c, d}, %2;"
               "add.cc.u32 e, a, c; addc.u32 f, b, d; mov.b64 %0, {e, f}; }"
               : "=l"(d)
               : "l"(a), "l"(b));
  return d;
}
FN u64 sub_borrow(u64 a, u64 b) {
  u64 d;
  asm volatile("{ .reg .u32 a, b, c, d, e, f; mov.b64 {a, b}, %1; mov.b64 {c, d}, %2;"
               "sub.cc.u32 e, a, c; subc.u32 f, b, d; mov.b64 %0, {e, f}; }"
               : "=l"(d)
               : "l"(a), "l"(b));
  return d;
}
FN u64 mad_carry(u32 a, u32 b, u64 c) {
  u64 d;
  asm volatile("{ .reg .u32 c, d, e, f; mov.b64 {c, d}, %3; mad.lo.cc.u32 e, %1, %2, c;"
               "madc.hi.u32 f, %1, %2, d; mov.b64 %0, {e, f}; }"
               : "=l"(d)
               : "r"(a), "r"(b), "l"(c));
  return d;
}
FN u32 either(float a, float b, u32 c) {
  u32 d;
  asm volatile("{ .reg .pred p, q, r; setp.ne.u32 r, %3, 0; setp.gt.xor.f32 p|q, %1, %2, !r;"
               "selp.u32 %0, 1, 0, p; @q add.u32 %0, %0, 2; }"
               : "=r"(d)
               : "f"(a), "f"(b), "r"(c));
  return d;
}
// x86 traps on the smallest number by -1.
template <typename T> FN T quotient(T a, T b) { return a / b; }
template <typename T> FN T remainder(T a, T b) { return a % b; }
FN u32 half_of(float a) { return __half_as_ushort(__float2half_rn(a)); }
FN float of_half(u32 a) { return __half2float(__ushort_as_half(u16(a))); }
FN u32 half_rounded(double a) { return __half_as_ushort(__double2half(a)); }

#else
#include "arithmetic_host.hpp"
#endif

// x y z: u32; i j k: i32; l m: u64; s t: i64; f g h: float; p q r: double.
// clang-format off
#define EXPRESSIONS(E)                                                                             \
  E(x + y) E(x - y) E(x * y) E(x / (y | 1)) E(x % (y | 1)) E(quotient(i, j | 1))                   \
  E(remainder(i, j | 1))                                                                           \
  E(x & y) E(x | ~y) E(x ^ y) E(x << (y & 31)) E(x >> (y & 31)) E(i >> (j & 31)) E(-i)             \
  E(l + m) E(l - m) E(l * m) E(l / (m | 1)) E(l % (m | 1)) E(quotient(s, t | 1))                   \
  E(remainder(s, t | 1))                                                                           \
  E(l << (y & 63)) E(l >> (y & 63)) E(s >> (y & 63)) E(l ^ ~m) E(-s) E(s < t ? s : t)              \
  E(i < j ? i : j) E(x > y ? x : y) E(l > m ? l : m) E(i < 0 ? -i : i) E(u64(x) * y)               \
  E(i64(i) * j) E(i64(i) * j + s) E(__mulhi(i, j)) E(__umulhi(x, y)) E(__umul64hi(l, m))           \
  E(__mul64hi(s, t)) E(mad_hi(i, j, k)) E(u8(x) + u8(y)) E(int8_t(x)) E(int16_t(x) * int16_t(y))   \
  E(u16(u16(x) * u16(y))) E(u16(x) / (u16(y) | 1)) E(i64(i)) E(u64(x)) E(i32(s)) E(int16_t(s))     \
  E(__popc(x)) E(__popcll(l)) E(__clz(x)) E(__clzll(l)) E(__ffs(x)) E(__brev(x)) E(__brevll(l))    \
  E(__usad(x, y, z)) E(__sad(i, j, z)) E(__byte_perm(x, y, z)) E(bfe_u32(x, y, z))                 \
  E(bfe_s32(i, j, k)) E(bfe_u32(x, y & 31, z & 31)) E(bfe_s32(i, j & 31, k & 31))                  \
  E(bfe_s64(s, y & 63, z & 63)) E(bfi(l, m, y, z)) E(bfi(l, m, y & 63, z & 63))                    \
  E(bfi32(x, y, z & 31, x & 31)) E(shf_l_clamp(x, y, z)) E(shf_r_clamp(x, y, z & 63))              \
  E(shf_l_wrap(x, y, z)) E(shf_r_wrap(x, y, z)) E(prmt_f4e(x, y, z)) E(prmt_b4e(x, y, z))          \
  E(prmt_rc8(x, y, z)) E(prmt_ecl(x, y, z)) E(prmt_ecr(x, y, z)) E(prmt_rc16(x, y, z))             \
  E(prmt_any(x, y, z)) E(lop3_96(x, y, z)) E(lop3_e8(x, y, z)) E(lop3_1b(x, y, z))                 \
  E(shl_b32(x, y)) E(shr_u32(x, y & 63)) E(shr_s32(i, j)) E(bfind_u32(x)) E(bfind_s32(i))          \
  E(bfind_shift(x)) E(cnot(x)) E(cnot(x & 1)) E(add_sat_s32(i, j)) E(sub_sat_s32(i, j))            \
  E(slct(i, j, k)) E(dp4a_su(i, j, k)) E(add_carry(l, m)) E(sub_borrow(l, m))                      \
  E(mad_carry(x, y, l)) E(sat_s8(i)) E(sat_u16(i)) E(f + g) E(f - g) E(f* g) E(f / g)              \
  E(fmaf(f, g, h)) E(sqrtf(f)) E(fabsf(f)) E(-f) E(f < g) E(f == g) E(f != g) E(!(f >= g))         \
  E(f > g ? f : h) E(fma_sat(f, g, h)) E(add_sat(f, g)) E(add_ftz(f, g)) E(mul_ftz(f, g))          \
  E(fma_ftz(f, g, h)) E(min_plain(f, g)) E(max_plain(f, g)) E(min_nan(f, g)) E(max_nan(f, g))      \
  E(copysign_ptx(f, g)) E(setp_ne(f, g)) E(setp_equ(f, g)) E(setp_ltu(f, g)) E(setp_geu(f, g))     \
  E(setp_num(f, g)) E(setp_nan(f, g)) E(set_f32(i, j)) E(set_u32(f, g)) E(testp_normal(f))         \
  E(testp_subnormal(f)) E(either(f, g, z & 1)) E(__fadd_rz(f, g)) E(__fadd_rd(f, g))               \
  E(__fadd_ru(f, g)) E(__fsub_rd(f, g)) E(__fmul_rz(f, g)) E(__fmul_rd(f, g)) E(__fmul_ru(f, g))   \
  E(__fmaf_rz(f, g, h)) E(__fmaf_rd(f, g, h)) E(__fmaf_ru(f, g, h)) E(__fdiv_rz(f, g))             \
  E(__fdiv_rd(f, g)) E(__fdiv_ru(f, g)) E(__fsqrt_rz(f)) E(__fsqrt_ru(f)) E(__frcp_rn(f))          \
  E(__frcp_rd(f)) E(__float2int_rn(f)) E(__float2int_rz(f)) E(__float2int_rd(f))                   \
  E(__float2int_ru(f)) E(__float2uint_rz(f)) E(__float2uint_ru(f)) E(__float2ll_rz(f))             \
  E(__float2ull_rn(f)) E(__double2int_rd(p)) E(__int2float_rn(i)) E(__int2float_rz(i))             \
  E(__uint2float_ru(x)) E(__ll2float_rn(s)) E(__ll2float_rd(s)) E(double(s)) E(double(i))          \
  E(double(f)) E(float(p)) E(__double2float_rz(p)) E(__double2float_ru(p)) E(p + q) E(p - q)       \
  E(p * q) E(p / q) E(fma(p, q, r)) E(sqrt(p)) E(p < q) E(p > q ? p : r) E(rintf(f)) E(truncf(f))  \
  E(floorf(f)) E(ceilf(f)) E(cvt_sat(f)) E(cvt_rni(f)) E(tf32_rna(f)) E(half_of(f)) E(of_half(x))  \
  E(half_rounded(p)) E(bf16x2(f, g)) E(bf16x2_rz(f, g)) E(bf16x2_relu(f, g)) E(f16x2(f, g))        \
  E(f16x2_add(x, y)) E(f16x2_mul(x, y)) E(f16x2_fma(x, y, z)) E(bf16x2_fma(x, y, z))               \
  E(bf16x2_max(x, y)) E(bf16x2_neg(x))
// clang-format on

template <typename T> FN u64 as_bits(T value) {
  u64 to = 0;
  memcpy(&to, &value, sizeof(value));
  return to;
}

// in [3, n] raw 64-bit values -> out [expressions, n].
FN void all(const u64* in, u64* out, u32 n, u32 at) {
  const u64 l = in[at], m = in[n + at], c = in[2 * n + at];
  const u32 x = u32(l), y = u32(m), z = u32(c);
  const i32 i = i32(x), j = i32(y), k = i32(z);
  const i64 s = i64(l), t = i64(m);
  const float f = bits_as<float>(x), g = bits_as<float>(y), h = bits_as<float>(z);
  const double p = bits_as<double>(l), q = bits_as<double>(m), r = bits_as<double>(c);
  u64* to = out + at;
#define EVALUATE(...)                                                                              \
  *to = as_bits(__VA_ARGS__);                                                                      \
  to += n;
  EXPRESSIONS(EVALUATE)
}

#ifdef __CUDACC__
extern "C" __global__ void arithmetic_kernel(const u64* in, u64* out, u32 n) {
  const u32 at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at < n)
    all(in, out, n, at);
}
#else
#define NAME(...) #__VA_ARGS__ "\n"
int main(int argc, char** argv) {
  if (argc > 1)
    return std::fputs(EXPRESSIONS(NAME), stdout) < 0;
  std::vector<u64> in;
  u64 value;
  while (std::fread(&value, 8, 1, stdin) == 1)
    in.push_back(value);
  const u32 n = u32(in.size() / 3);
  std::vector<u64> out(n);
#define ONE(...) +1
  out.resize(size_t(n) * (EXPRESSIONS(ONE)));
  for (u32 at = 0; at < n; ++at)
    all(in.data(), out.data(), n, at);
  return std::fwrite(out.data(), 8, out.size(), stdout) != out.size();
}
#endif
