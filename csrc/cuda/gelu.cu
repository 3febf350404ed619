// GELU on CUDA: a = x Phi(x) and its gradient, which can go in place.
#include "check.hpp"
#include "cuda/device/guard.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/tiles.cuh"
#include "cuda/device/types.cuh"
#include "cuda/device/vector.cuh"
#include "keywords.hpp"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

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

template <typename T, int kVector>
cudaError_t launch_width(const Params& p, bool forward, int64_t num_partials, cudaStream_t stream) {
  const dim3 block = tile_block(), grid = tile_grid(p.rows, p.width / kVector, num_partials);
  return forward ? launch<gelu_forward_kernel<T, kVector>>(grid, block, 0, stream, p)
                 : launch<gelu_backward_kernel<T, kVector>>(grid, block, 0, stream, p);
}

template <typename T, int kVector> bool whole(const Params& p) {
  return p.width % kVector == 0 && whole_vectors<T, kVector>(p.da, p.da_row_stride) &&
         whole_vectors<T, kVector>(p.x, p.x_row_stride) &&
         whole_vectors<T, kVector>(p.dx, p.dx_row_stride) &&
         whole_vectors<T, kVector>(p.a, p.a_row_stride);
}

void check_and_run(const char* op, const Params& p, bool forward, int64_t num_partials,
                   const py::kwargs& a) {
  const auto dtype = keyword<std::string>(a, "dtype");
  const auto device = keyword<int>(a, "device");
  const auto stream = pointer<CUstream_st>(a, "stream");
  require_not_negative(op, "rows", p.rows);
  require_not_negative(op, "width", p.width);
  require_matrix(op, "x", p.x, p.rows, p.width, p.x_row_stride, false);
  if (p.rows == 0 || p.width == 0)
    return; // a grid of no blocks is an error to CUDA
  require((p.partials != nullptr) == (num_partials > 0), op,
          "expected partials if and only if there are num_partials");
  const py::gil_scoped_release release;
  run_on(op, device, [&] {
    return with_type(op, dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if (whole<T, kVectorOf<T>>(p))
        return launch_width<T, kVectorOf<T>>(p, forward, num_partials, stream);
      return launch_width<T, 1>(p, forward, num_partials, stream);
    });
  });
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
  require_matrix(op, "a", p.a, p.rows, p.width, p.a_row_stride, true);
  check_and_run(op, p, true, 0, a);
}

void gelu_backward(const py::kwargs& a) {
  constexpr const char* op = "gelu_backward_cuda";
  const Params p{pointer<const void>(a, "da"),
                 pointer<const void>(a, "x"),
                 pointer<void>(a, "dx"),
                 pointer<void>(a, "a"),
                 pointer<float>(a, "partials"),
                 keyword<int64_t>(a, "rows"),
                 keyword<int64_t>(a, "width"),
                 keyword<int64_t>(a, "da_row_stride"),
                 keyword<int64_t>(a, "x_row_stride"),
                 keyword<int64_t>(a, "dx_row_stride"),
                 keyword<int64_t>(a, "a_row_stride")};
  require_matrix(op, "da", p.da, p.rows, p.width, p.da_row_stride, false);
  require_matrix(op, "dx", p.dx, p.rows, p.width, p.dx_row_stride, true);
  if (p.a != nullptr)
    require_matrix(op, "a", p.a, p.rows, p.width, p.a_row_stride, true);
  check_and_run(op, p, false, keyword<int64_t>(a, "num_partials"), a);
}

} // namespace
} // namespace dinov2_fast

void bind_gelu_cuda(py::module_& m) {
  using namespace dinov2_fast;
  m.def("gelu_forward_cuda", &gelu_forward,
        "x [R, F] -> a [R, F]; pointers, sizes and row strides in elements.");
  m.def("gelu_backward_cuda", &gelu_backward,
        "da, x [R, F] -> dx [R, F], which may be x; if not 0, a [R, F], which may be da, and "
        "partials [num_partials, F], the sums of dx over rows.");
}
