// What kernels on scores need besides scalar_math.hpp: exp of either sign, and float16 read.
#pragma once

#include "cpu/scalar_math.hpp"

#include <cstdint>

namespace dinov2_fast {

struct float16 {
  uint16_t bits;
};

// Exact: the exponent is rebased by a multiplication, which also reads subnormals.
[[gnu::always_inline]] inline float load(const float16& x) {
  const uint32_t word = x.bits;
  const float magnitude = bit_cast<float>((word & 0x7fffu) << 13) * 0x1p112f;
  uint32_t bits = bit_cast<uint32_t>(magnitude);
  bits |= magnitude >= 65536.0f ? 0x7f800000u : 0u; // infinity and NaN
  return bit_cast<float>(bits | (word & 0x8000u) << 16);
}

// exp(x) for any x, as exact as `exp_normal_or_zero`: 0 where that is, infinity above 88.37. NaN
// stays NaN.
[[gnu::always_inline]] inline float exp_any(float x) {
  constexpr float kLargest = 88.8f; // rounds to 2^128, which is infinity
  return exp_normal_or_zero(x > kLargest ? kLargest : x);
}

} // namespace dinov2_fast
