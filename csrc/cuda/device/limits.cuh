// What a grid of CUDA and numbers of 32 bits hold: what needs more is refused, never cut short.
#pragma once

#include "check.hpp"

#include <cstdint>
#include <limits>
#include <string>

namespace dinov2_fast {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxAlongX = kMaxInt, kMaxAlongY = 65535; // CTAs of a grid

inline void require_at_most(const char* op, const char* name, int64_t value, int64_t most) {
  if (value > most)
    refuse(op, std::string(name) + " must be at most " + std::to_string(most) + ", got " +
                   std::to_string(value) + "; use backend='reference'");
}

// CTAs along an axis of a grid for an argument of which each takes `per_cta`.
inline unsigned ctas_of(const char* op, const char* name, int64_t value, int64_t per_cta,
                        int64_t most_ctas) {
  require_at_most(op, name, value, most_ctas * per_cta);
  return static_cast<unsigned>((value + per_cta - 1) / per_cta);
}

} // namespace dinov2_fast
