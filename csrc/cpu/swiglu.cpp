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
  void* h;         // [R, F] or null
  float* partial;  // [blocks, 2F], the sums of dx12 over the rows of each block
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

template <typename T, bool kKeepsHidden> struct BackwardRows {
  [[gnu::always_inline]] static inline void run(const Backward& p, int64_t block, int64_t begin,
                                                int64_t end) {
    const int64_t hidden = p.hidden;
    float* __restrict sums = p.partial + block * 2 * hidden;
    for (int64_t i = 0; i < 2 * hidden; ++i)
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
        sums[i] += first;
        sums[hidden + i] += second;
        store(dx1[i], first);
        store(dx2[i], second);
        if (kKeepsHidden)
          store(h[i], gate * s * value);
      }
    }
  }
};

void require_sizes(const char* op, int64_t rows, int64_t hidden, int threads) {
  require(rows >= 0, op, "rows must not be negative, got " + std::to_string(rows));
  require(hidden >= 0, op, "hidden must not be negative, got " + std::to_string(hidden));
  require(threads >= 1, op, "threads must be at least 1, got " + std::to_string(threads));
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

void swiglu_backward(uintptr_t dh, uintptr_t x12, uintptr_t dx12, uintptr_t h, uintptr_t partial,
                     int64_t rows, int64_t hidden, int64_t rows_per_block, int64_t dh_row_stride,
                     int64_t x12_row_stride, int64_t dx12_row_stride, int64_t h_row_stride,
                     const std::string& dtype, int threads, const std::string& level_name) {
  constexpr const char* op = "swiglu_backward_cpu";
  const Backward p{reinterpret_cast<const void*>(dh),
                   reinterpret_cast<const void*>(x12),
                   reinterpret_cast<void*>(dx12),
                   reinterpret_cast<void*>(h),
                   reinterpret_cast<float*>(partial),
                   hidden,
                   dh_row_stride,
                   x12_row_stride,
                   dx12_row_stride,
                   h_row_stride};
  require_sizes(op, rows, hidden, threads);
  require(rows_per_block >= 1, op, "rows_per_block must be at least 1");
  require_matrix(op, "dh", p.dh, rows, hidden, dh_row_stride, false);
  require_matrix(op, "x12", p.x12, rows, 2 * hidden, x12_row_stride, false);
  require_matrix(op, "dx12", p.dx12, rows, 2 * hidden, dx12_row_stride, true);
  if (p.h != nullptr)
    require_matrix(op, "h", p.h, rows, hidden, h_row_stride, true);
  const Level level = choose_level(op, level_name);
  with_float_type(op, "x12", dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    auto* body = p.h != nullptr ? at_level<BackwardRows<T, true>, Backward>(level)
                                : at_level<BackwardRows<T, false>, Backward>(level);
    // Blocks do not depend on the threads, and so neither do the sums.
    const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
    parallel_rows(blocks, hidden * rows_per_block, threads, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block)
        body(p, block, block * rows_per_block, std::min(rows, (block + 1) * rows_per_block));
    });
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
      "dh [R, F], x12 [R, 2F] -> dx12 [R, 2F], h [R, F] unless null, partial [blocks, 2F] float32.",
      py::arg("dh"), py::arg("x12"), py::arg("dx12"), py::arg("h"), py::arg("partial"),
      py::arg("rows"), py::arg("hidden"), py::arg("rows_per_block"), py::arg("dh_row_stride"),
      py::arg("x12_row_stride"), py::arg("dx12_row_stride"), py::arg("h_row_stride"),
      py::arg("dtype"), py::arg("threads"), py::arg("level"),
      py::call_guard<py::gil_scoped_release>());
}
