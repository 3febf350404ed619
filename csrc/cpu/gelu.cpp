// GELU on the CPU: a = x * Phi(x), its gradient, and the sums of that gradient over rows.
#include "check.hpp"
#include "cpu/rows.hpp"

#include <cstdint>
#include <string>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

struct Forward {
  const void* x;        // [R, F]
  void* a;              // [R, F]
  int64_t width;        // F
  int64_t x_row_stride; // elements
  int64_t a_row_stride;
};

struct Backward {
  const void* da;   // [R, F]; may be the same rows as activation
  const void* x;    // [R, F]; may be the same rows as dx
  void* dx;         // [R, F]
  void* activation; // [R, F] or null: not wanted
  float* partials;  // [blocks, F] sums of dx over the rows of each block, or null: not wanted
  int64_t width;
  int64_t da_row_stride;
  int64_t x_row_stride;
  int64_t dx_row_stride;
  int64_t activation_row_stride;
};

// Of the normal distribution at |x|: its tail 1 - Phi(|x|) is ratio * e. Functions take the
// numbers, not this: what is handed on whole lies in memory, and its loop is not made of vectors.
struct Normal {
  float ratio;
  float e; // exp(-x^2 / 2)
};

// From here on e is 0: it would be subnormal. And infinity times 0 would not be 0.
constexpr float kFar = 13.2f;

// exp(-x^2 / 2) = 2^n 2^f with an integer n and |f| <= 1/2; 2^f is a polynomial of degree 5, fitted
// to the smallest largest relative error, 7.5e-8. The tail is erfc(z) / 2 = exp(-z^2) erfcx(z) / 2,
// z = |x| / sqrt(2), and erfcx(z) / t a polynomial of degree 9 in t = 1 / (1 + z / 2), fitted on
// z < 10.5 to 9e-9. Even and odd powers are two chains: a processor looks ahead over few vectors of
// so many operations, so that a long chain of them is what would take the time.
[[gnu::always_inline]] inline Normal normal(float x) {
  constexpr float kHalfSqrtHalf = 0.353553391f, kMinusHalfLog2e = -0.72134752f;
  constexpr uint32_t kOne = 0x3f800000u;
  const float size = __builtin_fabsf(x), square = size * size;
  const float shifted = square * kMinusHalfLog2e + kRound;
  const float f = square * kMinusHalfLog2e - (shifted - kRound);
  float mantissa = 0.0013276472f;
  mantissa = mantissa * f + 0.009675541f;
  mantissa = mantissa * f + 0.05550713f;
  mantissa = mantissa * f + 0.2402212f;
  mantissa = mantissa * f + 0.69314694f;
  mantissa = mantissa * f + 1.0000001f;
  // The last nine bits of kRound are 0: the shift leaves those of n.
  const float power = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + kOne);
  const float t = 1.0f / (1.0f + kHalfSqrtHalf * size), t2 = t * t;
  float even = -0.071329353f, odd = 0.0080565893f;
  even = even * t2 - 0.36061258f;
  odd = odd * t2 + 0.2355253265f;
  even = even * t2 - 0.058207686f;
  odd = odd * t2 + 0.229754167f;
  even = even * t2 + 0.1188347055f;
  odd = odd * t2 + 0.115471913f;
  even = even * t2 + 0.141030281f;
  odd = odd * t2 + 0.1414766325f;
  return {(odd * t + even) * t, square > kFar * kFar ? 0.0f : mantissa * power};
}

// x * Phi(x) = max(x, 0) - |x| * tail.
[[gnu::always_inline]] inline float gelu(float x, float tail) {
  const float size = __builtin_fabsf(x);
  return (x > 0.0f ? x : 0.0f) - (size < kFar ? size : kFar) * tail;
}

// Phi(x) + x * density, which is tail - |x| * density on the left and 1 less the same on the right.
[[gnu::always_inline]] inline float slope(float x, float ratio, float e) {
  constexpr float kInverseSqrt2Pi = 0.398942280f;
  const float size = __builtin_fabsf(x);
  const float left = (ratio - (size < kFar ? size : kFar) * kInverseSqrt2Pi) * e;
  return x < 0.0f ? left : 1.0f - left;
}

template <typename T> struct ForwardRows {
  [[gnu::always_inline]] static inline void run(const Forward& p, int64_t, int64_t begin,
                                                int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* __restrict x = static_cast<const T*>(p.x) + row * p.x_row_stride;
      T* __restrict a = static_cast<T*>(p.a) + row * p.a_row_stride;
#pragma omp simd
      for (int64_t i = 0; i < p.width; ++i) {
        const float value = load(x[i]);
        const Normal at = normal(value);
        store(a[i], gelu(value, at.ratio * at.e));
      }
    }
  }
};

template <typename T, bool kKeepsActivation, bool kKeepsSums> struct BackwardRows {
  [[gnu::always_inline]] static inline void run(const Backward& p, int64_t block, int64_t begin,
                                                int64_t end) {
    float* __restrict sums = p.partials + (kKeepsSums ? block * p.width : 0);
    for (int64_t i = 0; kKeepsSums && i < p.width; ++i)
      sums[i] = 0.0f;
    for (int64_t row = begin; row < end; ++row) {
      const T* da = static_cast<const T*>(p.da) + row * p.da_row_stride;
      const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
      T* dx = static_cast<T*>(p.dx) + row * p.dx_row_stride;
      T* activation = static_cast<T*>(p.activation) + row * p.activation_row_stride;
      // Each element is read before it is written, so in-place rows may be vectors all the same.
#pragma omp simd
      for (int64_t i = 0; i < p.width; ++i) {
        const float value = load(x[i]), gradient = load(da[i]);
        const Normal at = normal(value);
        const float result = gradient * slope(value, at.ratio, at.e);
        if (kKeepsSums)
          sums[i] += result;
        store(dx[i], result);
        if (kKeepsActivation)
          store(activation[i], gelu(value, at.ratio * at.e));
      }
    }
  }
};

template <typename T> auto backward_at(const Backward& p, Level level) {
  if (p.activation != nullptr)
    return p.partials != nullptr ? at_level<BackwardRows<T, true, true>, Backward>(level)
                                 : at_level<BackwardRows<T, true, false>, Backward>(level);
  return p.partials != nullptr ? at_level<BackwardRows<T, false, true>, Backward>(level)
                               : at_level<BackwardRows<T, false, false>, Backward>(level);
}

void require_sizes(const char* op, int64_t rows, int64_t width, int threads) {
  require_not_negative(op, "rows", rows);
  require_not_negative(op, "width", width);
  require_positive(op, "threads", threads);
}

void gelu_forward(uintptr_t x, uintptr_t a, int64_t rows, int64_t width, int64_t x_row_stride,
                  int64_t a_row_stride, const std::string& dtype, int threads,
                  const std::string& level_name) {
  constexpr const char* op = "gelu_forward_cpu";
  const Forward p{reinterpret_cast<const void*>(x), reinterpret_cast<void*>(a), width, x_row_stride,
                  a_row_stride};
  require_sizes(op, rows, width, threads);
  require_matrix(op, "x", p.x, rows, width, x_row_stride, false);
  require_matrix(op, "a", p.a, rows, width, a_row_stride, true);
  const Level level = choose_level(op, level_name);
  with_float_type(op, "x", dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    auto* body = at_level<ForwardRows<T>, Forward>(level);
    parallel_rows(rows, width, threads,
                  [&](int64_t begin, int64_t end) { body(p, 0, begin, end); });
  });
}

void gelu_backward(uintptr_t da, uintptr_t x, uintptr_t dx, uintptr_t activation,
                   uintptr_t partials, int64_t rows, int64_t width, int64_t block_rows,
                   int64_t da_row_stride, int64_t x_row_stride, int64_t dx_row_stride,
                   int64_t activation_row_stride, const std::string& dtype, int threads,
                   const std::string& level_name) {
  constexpr const char* op = "gelu_backward_cpu";
  const Backward p{reinterpret_cast<const void*>(da),
                   reinterpret_cast<const void*>(x),
                   reinterpret_cast<void*>(dx),
                   reinterpret_cast<void*>(activation),
                   reinterpret_cast<float*>(partials),
                   width,
                   da_row_stride,
                   x_row_stride,
                   dx_row_stride,
                   activation_row_stride};
  require_sizes(op, rows, width, threads);
  require_positive(op, "block_rows", block_rows);
  require_matrix(op, "da", p.da, rows, width, da_row_stride, false);
  require_matrix(op, "x", p.x, rows, width, x_row_stride, false);
  require_matrix(op, "dx", p.dx, rows, width, dx_row_stride, true);
  if (p.activation != nullptr)
    require_matrix(op, "activation", p.activation, rows, width, activation_row_stride, true);
  const Level level = choose_level(op, level_name);
  with_float_type(op, "x", dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    auto* body = backward_at<T>(p, level);
    parallel_blocks(rows, block_rows, width, threads,
                    [&](int64_t block, int64_t begin, int64_t end) { body(p, block, begin, end); });
  });
}

} // namespace
} // namespace dinov2_fast

void bind_gelu_cpu(py::module_& m) {
  using namespace dinov2_fast;
  m.def("gelu_forward_cpu", &gelu_forward,
        "x [R, F] -> a [R, F]; pointers, sizes and row strides in elements.", py::arg("x"),
        py::arg("a"), py::arg("rows"), py::arg("width"), py::arg("x_row_stride"),
        py::arg("a_row_stride"), py::arg("dtype"), py::arg("threads"), py::arg("level"),
        py::call_guard<py::gil_scoped_release>());
  m.def("gelu_backward_cpu", &gelu_backward,
        "da, x [R, F] -> dx [R, F], and unless null activation [R, F] and partials [blocks, F] "
        "float32.",
        py::arg("da"), py::arg("x"), py::arg("dx"), py::arg("activation"), py::arg("partials"),
        py::arg("rows"), py::arg("width"), py::arg("block_rows"), py::arg("da_row_stride"),
        py::arg("x_row_stride"), py::arg("dx_row_stride"), py::arg("activation_row_stride"),
        py::arg("dtype"), py::arg("threads"), py::arg("level"),
        py::call_guard<py::gil_scoped_release>());
}
