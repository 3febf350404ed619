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

struct Normal {
  float tail;    // 1 - Phi(|x|)
  float density; // of the normal distribution at x
};

// Phi from its tail: erfc(z) = exp(-z^2) erfcx(z), z = |x| / sqrt(2), and erfcx(z) / t a polynomial
// of degree 9 in t = 1 / (1 + z / 2), fitted on z < 10.5 to 9e-9. In float the tail's relative
// error grows with z^2, whose rounding exp magnifies: 4e-7 at x = -1, 2e-6 at -5, 1.5e-5 at -13.
[[gnu::always_inline]] inline Normal normal(float x) {
  constexpr float kInverseSqrt2 = 0.707106781f, kInverseSqrt2Pi = 0.398942280f;
  const float z = __builtin_fabsf(x) * kInverseSqrt2;
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.0161131786f;
  p = p * t - 0.142658706f;
  p = p * t + 0.471050653f;
  p = p * t - 0.72122516f;
  p = p * t + 0.459508334f;
  p = p * t - 0.116415372f;
  p = p * t + 0.230943826f;
  p = p * t + 0.237669411f;
  p = p * t + 0.282953265f;
  p = p * t + 0.282060562f;
  const float e = exp_normal_or_zero(-z * z);
  return {0.5f * (p * t) * e, kInverseSqrt2Pi * e};
}

// Tail and density are 0 from here on, and infinity times 0 would not be.
constexpr float kFar = 20.0f;

// x * Phi(x) = max(x, 0) - |x| * tail.
[[gnu::always_inline]] inline float gelu(float x, float tail) {
  const float size = __builtin_fabsf(x);
  return (x > 0.0f ? x : 0.0f) - (size < kFar ? size : kFar) * tail;
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
        store(a[i], gelu(value, normal(value).tail));
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
        const float cumulative = value < 0.0f ? at.tail : 1.0f - at.tail;
        const float least = value < kFar ? value : kFar; // NaN is in the tail already
        const float bounded = least > -kFar ? least : -kFar;
        const float result = gradient * (cumulative + bounded * at.density);
        if (kKeepsSums)
          sums[i] += result;
        store(dx[i], result);
        if (kKeepsActivation)
          store(activation[i], gelu(value, at.tail));
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
