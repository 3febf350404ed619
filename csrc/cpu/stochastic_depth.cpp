// Stochastic depth on the CPU: a branch's rows added into the residual stream in place, and the
// gradient gathered back out of it.
#include "check.hpp"
#include "cpu/level.hpp"
#include "cpu/rows.hpp"
#include "cpu/scalar_math.hpp"
#include "cpu/stream.hpp"

#include <algorithm>
#include <cstdint>
#include <string>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

struct Forward {
  void* x;                // [T, C]
  const void* residual;   // [R, C]
  const int64_t* rows;    // [R], or null: all
  const float* row_scale; // [R], or null: ones
  const float* gamma;     // [C]
  int64_t channels;
  int64_t x_row_stride; // elements
  int64_t residual_row_stride;
};

struct Backward {
  const void* dx;         // [T, C]
  const void* residual;   // [R, C] in the type of g, or null: ones
  const int64_t* rows;    // [R], or null: all
  const float* row_scale; // [R], or null: ones
  const float* gamma;     // [C]
  void* g;                // [R, C]
  float* partials;        // [blocks, C] sums of dx * row_scale * residual, or null: not wanted
  int64_t channels;
  int64_t dx_row_stride;
  int64_t residual_row_stride;
  int64_t g_row_stride;
  bool stream; // g
};

template <typename X, typename R> struct ForwardRows {
  [[gnu::always_inline]] static inline void run(const Forward& p, int64_t, int64_t begin,
                                                int64_t end) {
    const int64_t channels = p.channels;
    const float* __restrict gamma = p.gamma;
    for (int64_t row = begin; row < end; ++row) {
      X* __restrict x = static_cast<X*>(p.x) + selected(p.rows, row) * p.x_row_stride;
      const R* __restrict residual =
          static_cast<const R*>(p.residual) + row * p.residual_row_stride;
      const float scale = p.row_scale == nullptr ? 1.0f : p.row_scale[row];
      if (row + 1 < end) {
        prefetch_row(static_cast<const X*>(p.x) + selected(p.rows, row + 1) * p.x_row_stride,
                     channels);
        prefetch_row(residual + p.residual_row_stride, channels);
      }
#pragma omp simd
      for (int64_t i = 0; i < channels; ++i)
        store(x[i], load(x[i]) + load(residual[i]) * scale * gamma[i]);
    }
  }
};

template <typename D, typename G> struct BackwardRows {
  [[gnu::always_inline]] static inline void run(const Backward& p, int64_t block, int64_t begin,
                                                int64_t end) {
    const int64_t channels = p.channels;
    const float* __restrict gamma = p.gamma;
    float* __restrict sums = p.partials == nullptr ? nullptr : p.partials + block * channels;
    for (int64_t i = 0; sums != nullptr && i < channels; ++i)
      sums[i] = 0.0f;
    for (int64_t row = begin; row < end; ++row) {
      const D* __restrict dx =
          static_cast<const D*>(p.dx) + selected(p.rows, row) * p.dx_row_stride;
      const G* __restrict residual =
          static_cast<const G*>(p.residual) + row * p.residual_row_stride;
      G* __restrict g = static_cast<G*>(p.g) + row * p.g_row_stride;
      const float scale = p.row_scale == nullptr ? 1.0f : p.row_scale[row];
      const D* next = static_cast<const D*>(p.dx) +
                      selected(p.rows, std::min(row + 1, end - 1)) * p.dx_row_stride;
      if (!p.stream && row + 1 < end)
        prefetch_row(g + p.g_row_stride, channels);
      if (sums == nullptr)
        put_row(g, channels, p.stream, next,
                [=](auto at, int64_t i) { return at(dx, i) * scale * at(gamma, i); });
      else if (p.residual == nullptr)
        put_row(g, channels, p.stream, next, [=](auto at, int64_t i) {
          const auto scaled = at(dx, i) * scale;
          at.add(sums, i, scaled);
          return scaled * at(gamma, i);
        });
      else
        put_row(g, channels, p.stream, next, [=](auto at, int64_t i) {
          const auto scaled = at(dx, i) * scale;
          at.add(sums, i, scaled * at(residual, i));
          return scaled * at(gamma, i);
        });
    }
    finish_streams(p.stream);
  }
};

void stochastic_depth_forward(uintptr_t x, uintptr_t residual, uintptr_t rows, uintptr_t row_scale,
                              uintptr_t gamma, int64_t num_x_rows, int64_t num_rows,
                              int64_t channels, int64_t x_row_stride, int64_t residual_row_stride,
                              const std::string& x_dtype, const std::string& residual_dtype,
                              int threads, const std::string& level_name, const char* op) {
  const Forward p{reinterpret_cast<void*>(x),
                  reinterpret_cast<const void*>(residual),
                  reinterpret_cast<const int64_t*>(rows),
                  reinterpret_cast<const float*>(row_scale),
                  reinterpret_cast<const float*>(gamma),
                  channels,
                  x_row_stride,
                  residual_row_stride};
  require_numbers(op, channels, threads);
  require_rows(op, p.rows, num_rows, num_x_rows);
  require_matrix(op, "x", p.x, num_x_rows, channels, x_row_stride, true);
  require_matrix(op, "residual", p.residual, num_rows, channels, residual_row_stride, false);
  require_vector(op, "gamma", p.gamma, channels);
  const Level level = choose_level(op, level_name);
  with_float_type(op, "x", x_dtype, [&](auto x_type) {
    with_float_type(op, "residual", residual_dtype, [&](auto residual_type) {
      using Rows =
          ForwardRows<typename decltype(x_type)::type, typename decltype(residual_type)::type>;
      const auto run = at_level<Rows, Forward>(level);
      parallel_rows(num_rows, channels, threads,
                    [&](int64_t begin, int64_t end) { run(p, 0, begin, end); });
    });
  });
}

void stochastic_depth_backward(uintptr_t dx, uintptr_t residual, uintptr_t rows,
                               uintptr_t row_scale, uintptr_t gamma, uintptr_t g,
                               uintptr_t partials, uintptr_t sums, int64_t num_dx_rows,
                               int64_t num_rows, int64_t channels, int64_t block_rows,
                               int64_t dx_row_stride, int64_t residual_row_stride,
                               int64_t g_row_stride, const std::string& dx_dtype,
                               const std::string& g_dtype, int threads,
                               const std::string& level_name, const char* op) {
  Backward p{reinterpret_cast<const void*>(dx),
             reinterpret_cast<const void*>(residual),
             reinterpret_cast<const int64_t*>(rows),
             reinterpret_cast<const float*>(row_scale),
             reinterpret_cast<const float*>(gamma),
             reinterpret_cast<void*>(g),
             reinterpret_cast<float*>(partials),
             channels,
             dx_row_stride,
             residual_row_stride,
             g_row_stride,
             false};
  require_numbers(op, channels, threads, block_rows);
  require_rows(op, p.rows, num_rows, num_dx_rows);
  require_matrix(op, "dx", p.dx, num_dx_rows, channels, dx_row_stride, false);
  require_matrix(op, "g", p.g, num_rows, channels, g_row_stride, true);
  require_vector(op, "gamma", p.gamma, channels);
  require(partials == 0 || sums != 0, op,
          "sums must not be a null pointer where partials is given");
  const Level level = choose_level(op, level_name);
  with_float_type(op, "dx", dx_dtype, [&](auto dx_type) {
    with_float_type(op, "g", g_dtype, [&](auto g_type) {
      using G = typename decltype(g_type)::type;
      p.stream = streams<G>(num_rows, channels);
      using Rows = BackwardRows<typename decltype(dx_type)::type, G>;
      const auto run = at_level<Rows, Backward>(level);
      parallel_blocks(
          num_rows, block_rows, channels, threads,
          [&](int64_t block, int64_t begin, int64_t end) { run(p, block, begin, end); });
    });
  });
  if (p.partials != nullptr)
    add_partials(p.partials, blocks_of(num_rows, block_rows), channels,
                 reinterpret_cast<float*>(sums), threads);
}

} // namespace
} // namespace dinov2_fast

void bind_stochastic_depth_cpu(py::module_& m) {
  using namespace dinov2_fast;
  m.def("stochastic_depth_forward_cpu", &stochastic_depth_forward,
        "x [T, C] += residual [R, C] * row_scale [R] * gamma [C] at rows [R]; 0 for all rows and "
        "for a row_scale of ones; pointers, sizes and row strides in elements.",
        py::arg("x"), py::arg("residual"), py::arg("rows"), py::arg("row_scale"), py::arg("gamma"),
        py::arg("num_x_rows"), py::arg("num_rows"), py::arg("channels"), py::arg("x_row_stride"),
        py::arg("residual_row_stride"), py::arg("x_dtype"), py::arg("residual_dtype"),
        py::arg("threads"), py::arg("level"), py::arg("op") = "stochastic_depth_forward_cpu",
        py::call_guard<py::gil_scoped_release>());
  m.def("stochastic_depth_backward_cpu", &stochastic_depth_backward,
        "dx [T, C] at rows [R] * row_scale [R] * gamma [C] -> g [R, C], and sums [C] of "
        "dx * row_scale * residual over partials [blocks, C], or 0; pointers, sizes and row "
        "strides in elements.",
        py::arg("dx"), py::arg("residual"), py::arg("rows"), py::arg("row_scale"), py::arg("gamma"),
        py::arg("g"), py::arg("partials"), py::arg("sums"), py::arg("num_dx_rows"),
        py::arg("num_rows"), py::arg("channels"), py::arg("block_rows"), py::arg("dx_row_stride"),
        py::arg("residual_row_stride"), py::arg("g_row_stride"), py::arg("dx_dtype"),
        py::arg("g_dtype"), py::arg("threads"), py::arg("level"),
        py::arg("op") = "stochastic_depth_backward_cpu", py::call_guard<py::gil_scoped_release>());
}
