// The numbers of one step of AdamW with a moving average, the same for every device.
#pragma once

#include "check.hpp"
#include "keywords.hpp"

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>

namespace dinov2_fast {

// a + weight (b - a), from the nearer end: weight 0 gives a and weight 1 gives b, exactly.
struct Lerp {
  constexpr explicit Lerp(double weight)
      : from_b(weight >= 0.5), factor(static_cast<float>(weight >= 0.5 ? weight - 1.0 : weight)) {}

  [[gnu::always_inline]] inline float operator()(float a, float b) const {
    return (from_b ? b : a) + factor * (b - a);
  }

  bool from_b;
  float factor;
};

struct AdamW {
  Lerp first_moment, ema;
  float gradient_scale;
  float beta2, one_minus_beta2;
  float root_correction; // sqrt(1 - beta2^step)
  float eps;
  float decay; // 1 - lr * weight decay
  float rate;  // -lr / (1 - beta1^step)
};

// From the keywords lr, weight_decay, beta1, beta2, eps, step, momentum and gradient_scale.
inline AdamW adamw_of(const char* op, const pybind11::kwargs& a) {
  const double lr = keyword<double>(a, "lr"), weight_decay = keyword<double>(a, "weight_decay");
  const double beta1 = keyword<double>(a, "beta1"), beta2 = keyword<double>(a, "beta2");
  const int64_t step = keyword<int64_t>(a, "step");
  require_positive(op, "step", step);
  const double n = static_cast<double>(step);
  return {Lerp(1.0 - beta1),
          Lerp(1.0 - keyword<double>(a, "momentum")),
          static_cast<float>(keyword<double>(a, "gradient_scale")),
          static_cast<float>(beta2),
          static_cast<float>(1.0 - beta2),
          static_cast<float>(std::sqrt(1.0 - std::pow(beta2, n))),
          static_cast<float>(keyword<double>(a, "eps")),
          static_cast<float>(1.0 - lr * weight_decay),
          static_cast<float>(-lr / (1.0 - std::pow(beta1, n)))};
}

} // namespace dinov2_fast
