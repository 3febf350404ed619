// GELU on CUDA: a = x Phi(x) and its gradient, which can go in place.
#include "check.hpp"
#include "cuda/device/launch.cuh"
#include "cuda/device/run.cuh"
#include "cuda/device/tiles.cuh"
#include "cuda/device/vector.cuh"
#include "keywords.hpp"

#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

constexpr float kSqrtHalf = 0.7071067811865476f;
constexpr float kDensityAtZero = 0.3989422804014327f;
constexpr float kFar = 16.0f; // the density is 0 there, and beyond it x * x may overflow

struct Params {
  const void* da;  // [R, F], backward only; may be a
  const void* x;   // [R, F]
  void* dx;        // [R, F], backward only; may be x
  void* a;         // [R, F], or null in the backward
  float* partials; // [num_partials, F] sums of dx over rows, or null
  int64_t rows;    // R
  int64_t width;   // F
  int64_t da_row_stride;
  int64_t x_row_stride;
  int64_t dx_row_stride;
  int64_t a_row_stride;
};

__device__ float phi(float x) { return 0.5f * (1.0f + erff(x * kSqrtHalf)); }

template <typename T, int kVector>
__global__ void __launch_bounds__(kTileThreads) gelu_forward_kernel(const Params p) {
  const int64_t column = tile_column<kVector>();
  for_each_row<kVector>(p.rows, p.width, [&](int64_t row) {
    const auto x =
        load_vector<T, kVector>(static_cast<const T*>(p.x) + row * p.x_row_stride + column);
    Vector<T, kVector> a;
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      from_float(a.at[i], to_float(x.at[i]) * phi(to_float(x.at[i])));
    store_vector(static_cast<T*>(p.a) + row * p.a_row_stride + column, a);
  });
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kTileThreads) gelu_backward_kernel(const Params p) {
  const int64_t column = tile_column<kVector>();
  float sums[kVector] = {};
  for_each_row<kVector>(p.rows, p.width, [&](int64_t row) {
    const auto x =
        load_writable<T, kVector>(static_cast<const T*>(p.x) + row * p.x_row_stride + column);
    const auto da =
        load_writable<T, kVector>(static_cast<const T*>(p.da) + row * p.da_row_stride + column);
    Vector<T, kVector> dx, a;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float value = to_float(x.at[i]), share = phi(value);
      // Not by fminf alone: NaN must stay NaN, and the share keeps it.
      const float near = fminf(fmaxf(value, -kFar), kFar);
      const float density = kDensityAtZero * expf(-0.5f * near * near);
      const float gradient = to_float(da.at[i]) * (share + near * density);
      sums[i] += gradient;
      from_float(dx.at[i], gradient);
      from_float(a.at[i], value * share);
    }
    store_vector(static_cast<T*>(p.dx) + row * p.dx_row_stride + column, dx);
    if (p.a != nullptr)
      store_vector(static_cast<T*>(p.a) + row * p.a_row_stride + column, a);
  });
  if (p.partials != nullptr)
    store_column_sums(sums, p.partials + blockIdx.y * p.width, p.width);
}

void gelu_forward(const py::kwargs& a) {
  constexpr const char* op = "gelu_forward_cuda";
  Params p{};
  p.x = pointer<const void>(a, "x");
  p.a = pointer<void>(a, "a");
  p.rows = keyword<int64_t>(a, "rows");
  p.width = keyword<int64_t>(a, "width");
  p.x_row_stride = keyword<int64_t>(a, "x_row_stride");
  p.a_row_stride = keyword<int64_t>(a, "a_row_stride");
  require_matrix(op, "x", p.x, p.rows, p.width, p.x_row_stride, false);
  require_matrix(op, "a", p.a, p.rows, p.width, p.a_row_stride, true);
  run_tiles(op, a, p.rows, {"width", p.width}, nullptr, 0,
            {{p.x, p.x_row_stride}, {p.a, p.a_row_stride}},
            [&](auto lane, dim3 grid, cudaStream_t stream) {
              using L = decltype(lane);
              return launch<gelu_forward_kernel<typename L::type, L::kVector>>(grid, tile_block(),
                                                                               0, stream, p);
            });
}

void gelu_backward(const py::kwargs& a) {
  constexpr const char* op = "gelu_backward_cuda";
  const Params p{pointer<const void>(a, "da"),
                 pointer<const void>(a, "x"),
                 pointer<void>(a, "dx"),
                 pointer<void>(a, "activation"),
                 pointer<float>(a, "partials"),
                 keyword<int64_t>(a, "rows"),
                 keyword<int64_t>(a, "width"),
                 keyword<int64_t>(a, "da_row_stride"),
                 keyword<int64_t>(a, "x_row_stride"),
                 keyword<int64_t>(a, "dx_row_stride"),
                 keyword<int64_t>(a, "activation_row_stride")};
  require_matrix(op, "x", p.x, p.rows, p.width, p.x_row_stride, false);
  require_matrix(op, "da", p.da, p.rows, p.width, p.da_row_stride, false);
  require_matrix(op, "dx", p.dx, p.rows, p.width, p.dx_row_stride, true);
  if (p.a != nullptr)
    require_matrix(op, "activation", p.a, p.rows, p.width, p.a_row_stride, true);
  run_tiles(op, a, p.rows, {"width", p.width}, p.partials, keyword<int64_t>(a, "num_partials"),
            {{p.da, p.da_row_stride},
             {p.x, p.x_row_stride},
             {p.dx, p.dx_row_stride},
             {p.a, p.a_row_stride}},
            [&](auto lane, dim3 grid, cudaStream_t stream) {
              using L = decltype(lane);
              return launch<gelu_backward_kernel<typename L::type, L::kVector>>(grid, tile_block(),
                                                                                0, stream, p);
            });
}

} // namespace
} // namespace dinov2_fast

void bind_gelu_cuda(py::module_& m) {
  using namespace dinov2_fast;
  m.def("gelu_forward_cuda", &gelu_forward,
        "x [R, F] -> a [R, F]; pointers, sizes and row strides in elements.");
  m.def("gelu_backward_cuda", &gelu_backward,
        "da, x [R, F] -> dx [R, F], which may be x; if not 0, activation [R, F], which may be da, "
        "and "
        "partials [num_partials, F], the sums of dx over rows.");
}
