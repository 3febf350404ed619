// Plain C++ twins, for the host, of what arithmetic.cu has as intrinsics and inline PTX.
#pragma once

template <typename F> static auto rounding(int mode, F f) {
  const int before = std::fegetround();
  std::fesetround(mode);
  const volatile auto result = f();
  std::fesetround(before);
  return result;
}
#define ROUNDED(NAME, TYPE, ARGS, EXPRESSION)                                                      \
  FN TYPE NAME##_rn ARGS {                                                                         \
    return rounding(FE_TONEAREST, [&] { return TYPE(EXPRESSION); });                               \
  }                                                                                                \
  FN TYPE NAME##_rz ARGS {                                                                         \
    return rounding(FE_TOWARDZERO, [&] { return TYPE(EXPRESSION); });                              \
  }                                                                                                \
  FN TYPE NAME##_rd ARGS {                                                                         \
    return rounding(FE_DOWNWARD, [&] { return TYPE(EXPRESSION); });                                \
  }                                                                                                \
  FN TYPE NAME##_ru ARGS {                                                                         \
    return rounding(FE_UPWARD, [&] { return TYPE(EXPRESSION); });                                  \
  }
using vf = volatile float;
using vd = volatile double;
ROUNDED(__fadd, float, (vf a, vf b), a + b)
ROUNDED(__fsub, float, (vf a, vf b), a - b)
ROUNDED(__fmul, float, (vf a, vf b), a* b)
ROUNDED(__fdiv, float, (vf a, vf b), a / b)
ROUNDED(__fmaf, float, (vf a, vf b, vf c), std::fma(float(a), float(b), float(c)))
ROUNDED(__fsqrt, float, (vf a), std::sqrt(float(a)))
ROUNDED(__frcp, float, (vf a), 1.0f / a)
ROUNDED(__double2float, float, (vd a), a)
ROUNDED(__int2float, float, (volatile i32 a), a)
ROUNDED(__uint2float, float, (volatile u32 a), a)
ROUNDED(__ll2float, float, (volatile i64 a), a)
static double whole(double a, int mode) {
  return mode == 0   ? std::nearbyint(a)
         : mode == 1 ? std::trunc(a)
         : mode == 2 ? std::floor(a)
                     : std::ceil(a);
}
template <typename T> static T saturated(double a, double below, double above) {
  if (std::isnan(a))
    return 0;
  return a < below    ? std::numeric_limits<T>::min()
         : a >= above ? std::numeric_limits<T>::max()
                      : T(a);
}
#define TO_INTEGER(NAME, TYPE, FROM, LOW, HIGH)                                                    \
  FN TYPE NAME##_rn(FROM a) { return saturated<TYPE>(whole(a, 0), LOW, HIGH); }                    \
  FN TYPE NAME##_rz(FROM a) { return saturated<TYPE>(whole(a, 1), LOW, HIGH); }                    \
  FN TYPE NAME##_rd(FROM a) { return saturated<TYPE>(whole(a, 2), LOW, HIGH); }                    \
  FN TYPE NAME##_ru(FROM a) { return saturated<TYPE>(whole(a, 3), LOW, HIGH); }
TO_INTEGER(__float2int, i32, float, -0x1p31, 0x1p31)
TO_INTEGER(__float2uint, u32, float, 0.0, 0x1p32)
TO_INTEGER(__float2ll, i64, float, -0x1p63, 0x1p63)
TO_INTEGER(__float2ull, u64, float, 0.0, 0x1p64)
TO_INTEGER(__double2int, i32, double, -0x1p31, 0x1p31)
template <typename T> FN T quotient(T a, T b) { return T(static_cast<__int128>(a) / b); }
template <typename T> FN T remainder(T a, T b) { return T(static_cast<__int128>(a) % b); }
FN u32 __popc(u32 a) { return __builtin_popcount(a); }
FN u32 __popcll(u64 a) { return __builtin_popcountll(a); }
FN u32 __clz(u32 a) { return a ? __builtin_clz(a) : 32; }
FN u32 __clzll(u64 a) { return a ? __builtin_clzll(a) : 64; }
FN u32 __ffs(u32 a) { return __builtin_ffs(a); }
FN u64 __brevll(u64 a) {
  u64 d = 0;
  for (int i = 0; i < 64; ++i)
    d |= (a >> i & 1) << (63 - i);
  return d;
}
FN u32 __brev(u32 a) { return __brevll(a) >> 32; }
FN i32 __mulhi(i32 a, i32 b) { return i64(a) * b >> 32; }
FN u32 __umulhi(u32 a, u32 b) { return u64(a) * b >> 32; }
FN u64 __umul64hi(u64 a, u64 b) { return static_cast<unsigned __int128>(a) * b >> 64; }
FN i64 __mul64hi(i64 a, i64 b) { return static_cast<__int128>(a) * b >> 64; }
FN u32 __usad(u32 a, u32 b, u32 c) { return (a > b ? a - b : b - a) + c; }
FN u32 __sad(i32 a, i32 b, u32 c) { return (a > b ? u32(a) - b : u32(b) - a) + c; }
FN u32 setp_ne(float a, float b) { return a < b || a > b; }
FN u32 setp_equ(float a, float b) { return !(a < b || a > b); }
FN u32 setp_ltu(float a, float b) { return !(a >= b); }
FN u32 setp_geu(float a, float b) { return !(a < b); }
FN u32 setp_num(float a, float b) { return a == a && b == b; }
FN u32 setp_nan(float a, float b) { return a != a || b != b; }
FN float least(float a, float b) {
  if (a == b)
    return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
FN float min_plain(float a, float b) { return a != a ? b : b != b ? a : least(a, b); }
FN float max_plain(float a, float b) { return a != a ? b : b != b ? a : -least(-a, -b); }
FN float min_nan(float a, float b) { return a != a || b != b ? NAN : least(a, b); }
FN float max_nan(float a, float b) { return a != a || b != b ? NAN : -least(-a, -b); }
FN float flushed(float a) { return std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(0.f, a) : a; }
FN float clamped(float a) { return a > 0 ? std::min(a, 1.0f) : 0.0f; }
FN float add_ftz(float a, float b) { return flushed(flushed(a) + flushed(b)); }
FN float mul_ftz(float a, float b) { return flushed(flushed(a) * flushed(b)); }
FN float fma_ftz(float a, float b, float c) {
  return flushed(std::fma(flushed(a), flushed(b), flushed(c)));
}
FN float fma_sat(float a, float b, float c) { return clamped(std::fma(a, b, c)); }
FN float add_sat(float a, float b) { return clamped(a + b); }
FN float copysign_ptx(float a, float b) { return std::copysign(b, a); }
FN i32 limited(i64 a) { return std::max<i64>(INT32_MIN, std::min<i64>(INT32_MAX, a)); }
FN i32 add_sat_s32(i32 a, i32 b) { return limited(i64(a) + b); }
FN i32 sub_sat_s32(i32 a, i32 b) { return limited(i64(a) - b); }
FN i64 field(i64 a, u32 at, u32 count, int width, bool sign) {
  at &= 255, count &= 255;
  const int top = std::min<int>(at + count - 1, width - 1);
  const bool fill = sign && count && (a >> top & 1);
  i64 d = 0;
  for (int i = 0; i < 64; ++i) {
    const bool inside = i < int(count) && int(at) + i < width;
    d |= i64(inside ? a >> (at + i) & 1 : fill) << i;
  }
  return d;
}
FN u32 bfe_u32(u32 a, u32 at, u32 count) { return field(a, at, count, 32, false); }
FN i32 bfe_s32(i32 a, i32 at, i32 count) { return field(a, at, count, 32, true); }
FN i64 bfe_s64(i64 a, u32 at, u32 count) { return field(a, at, count, 64, true); }
FN u64 bfi(u64 a, u64 b, u32 at, u32 count, int width = 64) {
  at &= 255, count &= 255;
  for (u32 i = 0; i < count && at + i < u32(width); ++i)
    b = (b & ~(u64(1) << (at + i))) | (a >> i & 1) << (at + i);
  return b;
}
FN u32 bfi32(u32 a, u32 b, u32 at, u32 count) { return bfi(a, b, at, count, 32); }
FN u32 shift_pair(u64 pair, u32 by, bool left) { return left ? pair << by >> 32 : pair >> by; }
FN u32 shf_l_clamp(u32 a, u32 b, u32 c) {
  return c >= 32 ? a : shift_pair(u64(b) << 32 | a, c, true);
}
FN u32 shf_r_clamp(u32 a, u32 b, u32 c) {
  return c >= 32 ? b : shift_pair(u64(b) << 32 | a, c, false);
}
FN u32 shf_l_wrap(u32 a, u32 b, u32 c) { return shift_pair(u64(b) << 32 | a, c & 31, true); }
FN u32 shf_r_wrap(u32 a, u32 b, u32 c) { return shift_pair(u64(b) << 32 | a, c & 31, false); }
FN u32 pick(u32 a, u32 b, int i0, int i1, int i2, int i3) {
  const u64 pair = u64(b) << 32 | a;
  const auto byte = [&](int i) { return u32(pair >> 8 * (i & 7) & 255); };
  return byte(i0) | byte(i1) << 8 | byte(i2) << 16 | byte(i3) << 24;
}
FN u32 prmt_f4e(u32 a, u32 b, u32 c) {
  c &= 3;
  return pick(a, b, c, c + 1, c + 2, c + 3);
}
FN u32 prmt_b4e(u32 a, u32 b, u32 c) {
  c &= 3;
  return pick(a, b, c, c + 7, c + 6, c + 5);
}
FN u32 prmt_rc8(u32 a, u32 b, u32 c) {
  c &= 3;
  return pick(a, b, c, c, c, c);
}
FN u32 prmt_ecl(u32 a, u32 b, u32 c) {
  c &= 3;
  return pick(a, b, c, std::max(c, 1u), std::max(c, 2u), 3);
}
FN u32 prmt_ecr(u32 a, u32 b, u32 c) {
  c &= 3;
  return pick(a, b, 0, std::min(c, 1u), std::min(c, 2u), c);
}
FN u32 prmt_rc16(u32 a, u32 b, u32 c) {
  return c & 1 ? pick(a, b, 2, 3, 2, 3) : pick(a, b, 0, 1, 0, 1);
}
FN u32 prmt_any(u32 a, u32 b, u32 c) {
  u32 d = 0;
  for (int i = 0; i < 4; ++i) {
    u32 byte = pick(a, b, c >> 4 * i & 7, 0, 0, 0) & 255;
    if (c >> (4 * i + 3) & 1)
      byte = byte & 128 ? 255 : 0;
    d |= byte << 8 * i;
  }
  return d;
}
FN u32 __byte_perm(u32 a, u32 b, u32 c) { return prmt_any(a, b, c & 0x7777); }
FN u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 d = 0;
  for (int i = 0; i < 32; ++i)
    d |= (table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i;
  return d;
}
FN u32 lop3_96(u32 a, u32 b, u32 c) { return lop3(a, b, c, 0x96); }
FN u32 lop3_e8(u32 a, u32 b, u32 c) { return lop3(a, b, c, 0xe8); }
FN u32 lop3_1b(u32 a, u32 b, u32 c) { return lop3(a, b, c, 0x1b); }
FN u32 shl_b32(u32 a, u32 b) { return b > 31 ? 0 : a << b; }
FN u32 shr_u32(u32 a, u32 b) { return b > 31 ? 0 : a >> b; }
FN i32 shr_s32(i32 a, i32 b) { return a >> std::min(u32(b), 31u); }
FN u32 bfind_u32(u32 a) { return a ? 31 - __builtin_clz(a) : ~0u; }
FN u32 bfind_s32(i32 a) { return bfind_u32(a < 0 ? ~a : a); }
FN u32 bfind_shift(u32 a) { return a ? __builtin_clz(a) : ~0u; }
FN u32 cnot(u32 a) { return a == 0; }
FN u32 near_away(u32 a, int drop) { return (a + (1u << (drop - 1))) >> drop << drop; }
FN u32 tf32_rna(float a) {
  const u32 raw = bits_as<u32>(a);
  return a != a ? 0x7fffffff : std::isinf(a) ? raw : near_away(raw, 13);
}
FN float cvt_sat(float a) { return clamped(a); }
FN float cvt_rni(float a) { return std::nearbyint(a); }
FN i32 sat_s8(i32 a) { return std::max(-128, std::min(127, a)); }
FN u32 sat_u16(i32 a) { return std::max(0, std::min(65535, a)); }
FN u32 to_bf16(double a) { // nearest even, from the two bf16 around it
  if (a != a)
    return 0x7fff;
  const float cut = rounding(FE_TOWARDZERO, [&] { return float(vd{a}); });
  const u32 low = bits_as<u32>(cut) >> 16, high = low + 1;
  const auto value = [](u32 b) { return double(bits_as<float>(b << 16)); };
  if (std::isinf(a) || value(low) == a)
    return low;
  const double top = (high & 0x7fff) == 0x7f80 ? std::copysign(0x1p128, a) : value(high);
  const double under = std::abs(a - value(low)), over = std::abs(top - a);
  return under < over || (under == over && low % 2 == 0) ? low : high;
}
FN u32 bf16x2(float a, float b) { return to_bf16(a) << 16 | to_bf16(b); }
FN u32 bf16x2_rz(float a, float b) {
  const auto cut = [](float x) { return x != x ? 0x7fffu : bits_as<u32>(x) >> 16; };
  return cut(a) << 16 | cut(b);
}
FN float rectified(float a) { return a > 0 || a != a ? a : 0.0f; }
FN u32 bf16x2_relu(float a, float b) { return bf16x2(rectified(a), rectified(b)); }
FN u32 half_of(float a) { return a != a ? 0x7fff : bits_as<u16>(_Float16(a)); }
FN float of_half(u32 a) { return float(bits_as<_Float16>(u16(a))); }
FN u32 half_rounded(double a) { return a != a ? 0x7fff : bits_as<u16>(_Float16(a)); }
FN u32 f16x2(float a, float b) { return half_of(a) << 16 | half_of(b); }
FN i32 slct(i32 a, i32 b, i32 c) { return c >= 0 ? a : b; }
template <typename F> FN u32 halves(u32 a, u32 b, u32 c, F f) {
  const u32 low = f(a & 65535, b & 65535, c & 65535);
  return f(a >> 16, b >> 16, c >> 16) << 16 | low;
}
FN u32 quiet(_Float16 a) { return a != a ? 0x7fff : bits_as<u16>(a); }
FN _Float16 half(u32 a) { return bits_as<_Float16>(u16(a)); }
FN float brain(u32 a) { return bits_as<float>(a << 16); }
FN u32 f16x2_add(u32 a, u32 b) {
  return halves(a, b, 0, [](u32 x, u32 y, u32) { return quiet(half(x) + half(y)); });
}
FN u32 f16x2_mul(u32 a, u32 b) {
  return halves(a, b, 0, [](u32 x, u32 y, u32) { return quiet(half(x) * half(y)); });
}
FN u32 f16x2_fma(u32 a, u32 b, u32 c) { // exact in __float128, rounded once
  return halves(a, b, c, [](u32 x, u32 y, u32 z) {
    const __float128 sum = __float128(half(x)) * half(y) + half(z);
    return quiet(_Float16(sum));
  });
}
FN u32 bf16x2_fma(u32 a, u32 b, u32 c) { // the double's rounding error breaks ties
  return halves(a, b, c, [](u32 x, u32 y, u32 z) {
    const vd product = double(brain(x)) * brain(y), addend = brain(z);
    const vd sum = product + addend;
    double d = sum;
    if (std::isfinite(d)) {
      const vd back = sum - product;
      const vd lost = sum - back;
      const double error = (product - lost) + (addend - back);
      if (error != 0 && d != 0)
        d = bits_as<double>((bits_as<u64>(d) - ((error > 0) != (d > 0))) | 1);
    }
    return to_bf16(d);
  });
}
FN u32 bf16x2_max(u32 a, u32 b) {
  return halves(a, b, 0, [](u32 x, u32 y, u32) { return to_bf16(max_plain(brain(x), brain(y))); });
}
FN u32 bf16x2_neg(u32 a) { return a ^ 0x80008000; }
FN u32 testp_normal(float a) { return std::fpclassify(a) == FP_NORMAL; }
FN u32 testp_subnormal(float a) { return std::fpclassify(a) == FP_SUBNORMAL; }
FN float set_f32(i32 a, i32 b) { return a > b; }
FN u32 set_u32(float a, float b) { return a > b ? 0 : ~0u; }
FN i32 mad_hi(i32 a, i32 b, i32 c) { return u32(__mulhi(a, b)) + c; }
FN i32 dp4a_su(i32 a, i32 b, i32 c) {
  u32 d = c;
  for (int i = 0; i < 4; ++i)
    d += int(int8_t(a >> 8 * i)) * int(u8(b >> 8 * i));
  return d;
}
FN u64 add_carry(u64 a, u64 b) { return a + b; }
FN u64 sub_borrow(u64 a, u64 b) { return a - b; }
FN u64 mad_carry(u32 a, u32 b, u64 c) { return u64(a) * b + c; }
FN u32 either(float a, float b, u32 c) {
  const bool gt = a > b, r = c == 0;
  return u32(gt != r) + 2 * u32(!gt != r);
}
