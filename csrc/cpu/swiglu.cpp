// SwiGLU on the CPU: h = silu(x1) * x2 and its gradient, rows of [x1 | x2] side by side.
#include "check.hpp"
#include "cpu/rows.hpp"

#include <cstdint>
#include <string>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

struct Forward {
  const void* x12;        // [R, 2F]
  void* h;                // [R, F]
  int64_t hidden;         // F
  int64_t x12_row_stride; // elements
  int64_t h_row_stride;
};

struct Backward {
  const void* dh;  // [R, F]; may be the same rows as h
  const void* x12; // [R, 2F]; may be the same rows as dx12
  void* dx12;      // [R, 2F]
  void* h;         // [R, F] or null: not wanted
  float* partials; // [blocks, 2F] sums of dx12 over the rows of each block, or null: not wanted
  int64_t hidden;
  int64_t dh_row_stride;
  int64_t x12_row_stride;
  int64_t dx12_row_stride;
  int64_t h_row_stride;
};

template <typename T> struct ForwardRows {
  [[gnu::always_inline]] static inline void run(const Forward& p, int64_t, int64_t begin,
                                                int64_t end) {
    const int64_t hidden = p.hidden;
    for (int64_t row = begin; row < end; ++row) {
      const T* __restrict x1 = static_cast<const T*>(p.x12) + row * p.x12_row_stride;
      const T* __restrict x2 = x1 + hidden;
      T* __restrict h = static_cast<T*>(p.h) + row * p.h_row_stride;
#pragma omp simd
      for (int64_t i = 0; i < hidden; ++i) {
        const float gate = load(x1[i]);
        store(h[i], gate * sigmoid(gate) * load(x2[i]));
      }
    }
  }
};

template <typename T, bool kKeepsHidden, bool kKeepsSums> struct BackwardRows {
  [[gnu::always_inline]] static inline void run(const Backward& p, int64_t block, int64_t begin,
                                                int64_t end) {
    const int64_t hidden = p.hidden;
    float* __restrict sums = p.partials + (kKeepsSums ? block * 2 * hidden : 0);
    for (int64_t i = 0; kKeepsSums && i < 2 * hidden; ++i)
      sums[i] = 0.0f;
    for (int64_t row = begin; row < end; ++row) {
      const T* dh = static_cast<const T*>(p.dh) + row * p.dh_row_stride;
      const T* x1 = static_cast<const T*>(p.x12) + row * p.x12_row_stride;
      const T* x2 = x1 + hidden;
      T* dx1 = static_cast<T*>(p.dx12) + row * p.dx12_row_stride;
      T* dx2 = dx1 + hidden;
      T* h = static_cast<T*>(p.h) + row * p.h_row_stride;
      // Each element is read before it is written, so in-place rows may be vectors all the same.
#pragma omp simd
      for (int64_t i = 0; i < hidden; ++i) {
        const float gate = load(x1[i]), value = load(x2[i]), gradient = load(dh[i]);
        const float s = sigmoid(gate);
        const float first = gradient * value * (s * (1.0f + gate * (1.0f - s)));
        const float second = gradient * (gate * s);
        if (kKeepsSums) {
          sums[i] += first;
          sums[hidden + i] += second;
        }
        store(dx1[i], first);
        store(dx2[i], second);
        if (kKeepsHidden)
          store(h[i], gate * s * value);
      }
    }
  }
};

template <typename T> auto backward_at(const Backward& p, Level level) {
  if (p.h != nullptr)
    return p.partials != nullptr ? at_level<BackwardRows<T, true, true>, Backward>(level)
                                 : at_level<BackwardRows<T, true, false>, Backward>(level);
  return p.partials != nullptr ? at_level<BackwardRows<T, false, true>, Backward>(level)
                               : at_level<BackwardRows<T, false, false>, Backward>(level);
}

void require_sizes(const char* op, int64_t rows, int64_t hidden, int threads) {
  require_not_negative(op, "rows", rows);
  require_not_negative(op, "hidden", hidden);
  require_positive(op, "threads", threads);
}

void swiglu_forward(uintptr_t x12, uintptr_t h, int64_t rows, int64_t hidden,
                    int64_t x12_row_stride, int64_t h_row_stride, const std::string& dtype,
                    int threads, const std::string& level_name) {
  constexpr const char* op = "swiglu_forward_cpu";
  const Forward p{reinterpret_cast<const void*>(x12), reinterpret_cast<void*>(h), hidden,
                  x12_row_stride, h_row_stride};
  require_sizes(op, rows, hidden, threads);
  require_matrix(op, "x12", p.x12, rows, 2 * hidden, x12_row_stride, false);
  require_matrix(op, "h", p.h, rows, hidden, h_row_stride, true);
  const Level level = choose_level(op, level_name);
  with_float_type(op, "x12", dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    auto* body = at_level<ForwardRows<T>, Forward>(level);
    parallel_rows(rows, hidden, threads,
                  [&](int64_t begin, int64_t end) { body(p, 0, begin, end); });
  });
}

void swiglu_backward(uintptr_t dh, uintptr_t x12, uintptr_t dx12, uintptr_t h, uintptr_t partials,
                     int64_t rows, int64_t hidden, int64_t block_rows, int64_t dh_row_stride,
                     int64_t x12_row_stride, int64_t dx12_row_stride, int64_t h_row_stride,
                     const std::string& dtype, int threads, const std::string& level_name) {
  constexpr const char* op = "swiglu_backward_cpu";
  const Backward p{reinterpret_cast<const void*>(dh),
                   reinterpret_cast<const void*>(x12),
                   reinterpret_cast<void*>(dx12),
                   reinterpret_cast<void*>(h),
                   reinterpret_cast<float*>(partials),
                   hidden,
                   dh_row_stride,
                   x12_row_stride,
                   dx12_row_stride,
                   h_row_stride};
  require_sizes(op, rows, hidden, threads);
  require_positive(op, "block_rows", block_rows);
  require_matrix(op, "dh", p.dh, rows, hidden, dh_row_stride, false);
  require_matrix(op, "x12", p.x12, rows, 2 * hidden, x12_row_stride, false);
  require_matrix(op, "dx12", p.dx12, rows, 2 * hidden, dx12_row_stride, true);
  if (p.h != nullptr)
    require_matrix(op, "h", p.h, rows, hidden, h_row_stride, true);
  const Level level = choose_level(op, level_name);
  with_float_type(op, "x12", dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    auto* body = backward_at<T>(p, level);
    parallel_blocks(rows, block_rows, hidden, threads,
                    [&](int64_t block, int64_t begin, int64_t end) { body(p, block, begin, end); });
  });
}

} // namespace
} // namespace dinov2_fast

void bind_swiglu_cpu(py::module_& m) {
  using namespace dinov2_fast;
  m.def("swiglu_forward_cpu", &swiglu_forward,
        "x12 [R, 2F] -> h [R, F]; pointers, sizes and row strides in elements.", py::arg("x12"),
        py::arg("h"), py::arg("rows"), py::arg("hidden"), py::arg("x12_row_stride"),
        py::arg("h_row_stride"), py::arg("dtype"), py::arg("threads"), py::arg("level"),
        py::call_guard<py::gil_scoped_release>());
  m.def(
      "swiglu_backward_cpu", &swiglu_backward,
      "dh [R, F], x12 [R, 2F] -> dx12 [R, 2F], and unless null h [R, F] and partials [blocks, 2F] "
      "float32.",
      py::arg("dh"), py::arg("x12"), py::arg("dx12"), py::arg("h"), py::arg("partials"),
      py::arg("rows"), py::arg("hidden"), py::arg("block_rows"), py::arg("dh_row_stride"),
      py::arg("x12_row_stride"), py::arg("dx12_row_stride"), py::arg("h_row_stride"),
      py::arg("dtype"), py::arg("threads"), py::arg("level"),
      py::call_guard<py::gil_scoped_release>());
}
