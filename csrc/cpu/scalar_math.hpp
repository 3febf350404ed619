// Branch-free scalar arithmetic that compilers turn into vectors of any width.
#pragma once

#include <cstdint>
#include <cstring>

namespace dinov2_fast {

struct bfloat16 {
  uint16_t bits;
};

template <typename To, typename From> [[gnu::always_inline]] inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

[[gnu::always_inline]] inline float load(const float& x) { return x; }

[[gnu::always_inline]] inline float load(const bfloat16& x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

[[gnu::always_inline]] inline void store(float& to, float x) { to = x; }

// Round to nearest, ties to even; every NaN becomes the quiet one.
[[gnu::always_inline]] inline void store(bfloat16& to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

constexpr float kRound = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer

// exp(x) = mantissa * 2^n, as mantissa and kRound + n.
struct ExpParts {
  float mantissa;
  float shifted;
};

// Reduction x = n ln2 + r, |r| <= ln2/2, then a degree-6 polynomial fitted to the smallest largest
// relative error of exp(r), 3.1e-9.
[[gnu::always_inline]] inline ExpParts exp_parts(float x) {
  constexpr float kLog2e = 1.44269504f;
  // ln2 in two parts; the first has 15 significant bits, so n * kLn2High is exact for |n| < 2^9.
  constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  const float shifted = x * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 0.00138145988f;
  p = p * r + 0.00836871658f;
  p = p * r + 0.041668389f;
  p = p * r + 0.166665211f;
  p = p * r + 0.49999994f;
  return {(p * r) * r + r + 1.0f, shifted};
}

// exp(x) for x <= 0, within 1.01 ulp of the true value (the largest error over every fifth float of
// the range; 0.75 ulp where the result is subnormal). NaN stays NaN.
[[gnu::always_inline]] inline float exp_nonpositive(float x) {
  constexpr float kSmallest = -104.0f; // exp of anything below is 0 in float
  const ExpParts parts = exp_parts(x < kSmallest ? kSmallest : x);
  // 2^n as a product of two normal powers, so that results below 2^-126 come out subnormal.
  const int32_t exponent = bit_cast<int32_t>(parts.shifted) - bit_cast<int32_t>(kRound);
  const int32_t half = exponent >> 1;
  const float low = bit_cast<float>((half + 127) << 23);
  const float high = bit_cast<float>((exponent - half + 127) << 23);
  return parts.mantissa * low * high;
}

// The same, but 0 where the result would be subnormal: a third fewer operations.
[[gnu::always_inline]] inline float exp_normal_or_zero(float x) {
  constexpr float kSmallest = -87.3365402f; // exp of the next float is subnormal
  constexpr uint32_t kOne = 0x3f800000u;
  const ExpParts parts = exp_parts(x);
  // The last nine bits of kRound are 0: the shift leaves those of n.
  const float power = bit_cast<float>((bit_cast<uint32_t>(parts.shifted) << 23) + kOne);
  return x < kSmallest ? 0.0f : parts.mantissa * power;
}

// 1 / (1 + exp(-x)) without overflow for any x.
[[gnu::always_inline]] inline float sigmoid(float x) {
  const float magnitude = x < 0.0f ? x : -x;
  const float e = exp_nonpositive(magnitude);
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

} // namespace dinov2_fast
