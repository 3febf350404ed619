// SwiGLU on the CPU: h = silu(x1) * x2 and its gradient, rows of [x1 | x2] side by side.
#include "check.hpp"
#include "cpu/level.hpp"
#include "cpu/parallel.hpp"
#include "cpu/scalar_math.hpp"

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
  const void* dh;  // [R, F]
  const void* x12; // [R, 2F]
  void* dx12;      // [R, 2F]
  int64_t hidden;
  int64_t dh_row_stride;
  int64_t x12_row_stride;
  int64_t dx12_row_stride;
};

template <typename T>
[[gnu::always_inline]] inline void rows_of(const Forward& p, int64_t begin, int64_t end) {
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

template <typename T>
[[gnu::always_inline]] inline void rows_of(const Backward& p, int64_t begin, int64_t end) {
  const int64_t hidden = p.hidden;
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict dh = static_cast<const T*>(p.dh) + row * p.dh_row_stride;
    const T* __restrict x1 = static_cast<const T*>(p.x12) + row * p.x12_row_stride;
    const T* __restrict x2 = x1 + hidden;
    T* __restrict dx1 = static_cast<T*>(p.dx12) + row * p.dx12_row_stride;
    T* __restrict dx2 = dx1 + hidden;
#pragma omp simd
    for (int64_t i = 0; i < hidden; ++i) {
      const float gate = load(x1[i]), gradient = load(dh[i]);
      const float s = sigmoid(gate);
      store(dx1[i], gradient * load(x2[i]) * (s * (1.0f + gate * (1.0f - s))));
      store(dx2[i], gradient * (gate * s));
    }
  }
}

template <typename T, typename P> void rows_baseline(const P& p, int64_t begin, int64_t end) {
  rows_of<T>(p, begin, end);
}

#if defined(__x86_64__)
template <typename T, typename P>
[[gnu::target("avx2,fma")]] void rows_avx2(const P& p, int64_t begin, int64_t end) {
  rows_of<T>(p, begin, end);
}

template <typename T, typename P>
[[gnu::target("avx512f,avx512bw,avx512dq,avx512vl,fma")]] void
rows_avx512(const P& p, int64_t begin, int64_t end) {
  rows_of<T>(p, begin, end);
}
#endif

template <typename T, typename P> void run(const P& p, int64_t rows, int threads, Level level) {
  auto* body = rows_baseline<T, P>;
#if defined(__x86_64__)
  if (level == Level::avx2)
    body = rows_avx2<T, P>;
  if (level == Level::avx512)
    body = rows_avx512<T, P>;
#else
  (void)level;
#endif
  parallel_rows(rows, p.hidden, threads, [&](int64_t begin, int64_t end) { body(p, begin, end); });
}

template <typename P>
void launch(const char* op, const P& p, int64_t rows, const std::string& dtype, int threads,
            const std::string& level_name) {
  const Level level = choose_level(op, level_name);
  if (dtype == "float32")
    run<float>(p, rows, threads, level);
  else if (dtype == "bfloat16")
    run<bfloat16>(p, rows, threads, level);
  else
    throw py::value_error(std::string(op) + ": expected float32 or bfloat16, got " + dtype);
}

void require_sizes(const char* op, int64_t rows, int64_t hidden, int threads) {
  require(rows >= 0, op, "rows must not be negative, got " + std::to_string(rows));
  require(hidden >= 0, op, "hidden must not be negative, got " + std::to_string(hidden));
  require(threads >= 1, op, "threads must be at least 1, got " + std::to_string(threads));
}

void swiglu_forward(uintptr_t x12, uintptr_t h, int64_t rows, int64_t hidden,
                    int64_t x12_row_stride, int64_t h_row_stride, const std::string& dtype,
                    int threads, const std::string& level) {
  constexpr const char* op = "swiglu_forward_cpu";
  const Forward p{reinterpret_cast<const void*>(x12), reinterpret_cast<void*>(h), hidden,
                  x12_row_stride, h_row_stride};
  require_sizes(op, rows, hidden, threads);
  require_matrix(op, "x12", p.x12, rows, 2 * hidden, x12_row_stride, false);
  require_matrix(op, "h", p.h, rows, hidden, h_row_stride, true);
  launch(op, p, rows, dtype, threads, level);
}

void swiglu_backward(uintptr_t dh, uintptr_t x12, uintptr_t dx12, int64_t rows, int64_t hidden,
                     int64_t dh_row_stride, int64_t x12_row_stride, int64_t dx12_row_stride,
                     const std::string& dtype, int threads, const std::string& level) {
  constexpr const char* op = "swiglu_backward_cpu";
  const Backward p{reinterpret_cast<const void*>(dh),
                   reinterpret_cast<const void*>(x12),
                   reinterpret_cast<void*>(dx12),
                   hidden,
                   dh_row_stride,
                   x12_row_stride,
                   dx12_row_stride};
  require_sizes(op, rows, hidden, threads);
  require_matrix(op, "dh", p.dh, rows, hidden, dh_row_stride, false);
  require_matrix(op, "x12", p.x12, rows, 2 * hidden, x12_row_stride, false);
  require_matrix(op, "dx12", p.dx12, rows, 2 * hidden, dx12_row_stride, true);
  launch(op, p, rows, dtype, threads, level);
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
  m.def("swiglu_backward_cpu", &swiglu_backward,
        "dh [R, F], x12 [R, 2F] -> dx12 [R, 2F]; pointers, sizes and row strides in elements.",
        py::arg("dh"), py::arg("x12"), py::arg("dx12"), py::arg("rows"), py::arg("hidden"),
        py::arg("dh_row_stride"), py::arg("x12_row_stride"), py::arg("dx12_row_stride"),
        py::arg("dtype"), py::arg("threads"), py::arg("level"),
        py::call_guard<py::gil_scoped_release>());
}
