// Branch outputs added into the residual stream, and rows of its gradient gathered for a branch.
#include "check.hpp"
#include "cuda/device/launch.cuh"
#include "cuda/device/run.cuh"
#include "cuda/device/tiles.cuh"
#include "cuda/device/types.cuh"
#include "cuda/device/vector.cuh"
#include "keywords.hpp"

#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

struct ScatterParams {
  void* x;                // [T, C], added to
  const void* residual;   // [R, C]
  const int64_t* rows;    // [R], or null: all
  const float* row_scale; // [R], or null: ones
  const float* gamma;     // [C], or null: ones
  int64_t num_rows;       // R
  int64_t channels;       // C
  int64_t x_row_stride;
  int64_t residual_row_stride;
};

struct GatherParams {
  const void* dx;         // [T, C]
  const void* residual;   // [R, C], or null: ones
  const int64_t* rows;    // [R], or null: all
  const float* row_scale; // [R], or null: ones
  const float* gamma;     // [C], or null: ones
  void* g;                // [R, C]
  float* partials;        // [num_partials, C] sums of dx * row_scale * residual, or null
  int64_t num_rows;       // R
  int64_t channels;       // C
  int64_t dx_row_stride;
  int64_t residual_row_stride;
  int64_t g_row_stride;
};

// The part of gamma that belongs to a thread's column; it is the same for all its rows.
template <int kVector>
__device__ void load_gamma(const float* gamma, int64_t channels, float (&part)[kVector]) {
  const int64_t column = tile_column<kVector>();
  if (gamma != nullptr && column < channels)
    copy_floats<kVector>(part, gamma + column);
  else
    for (float& one : part)
      one = 1.0f;
}

template <typename X, typename Y, int kVector>
__global__ void __launch_bounds__(kTileThreads, ctas_at_half(kTileThreads))
    stochastic_depth_scatter_kernel(const ScatterParams p) {
  const int64_t column = tile_column<kVector>();
  alignas(16) float gamma[kVector];
  load_gamma<kVector>(p.gamma, p.channels, gamma);
  for_each_row<kVector>(p.num_rows, p.channels, [&](int64_t row) {
    const int64_t to = p.rows == nullptr ? row : p.rows[row];
    const float scale = p.row_scale == nullptr ? 1.0f : p.row_scale[row];
    X* x = static_cast<X*>(p.x) + to * p.x_row_stride + column;
    const auto update = load_vector<Y, kVector>(static_cast<const Y*>(p.residual) +
                                                row * p.residual_row_stride + column);
    auto sum = load_writable<X, kVector>(x);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      from_float(sum.at[i], to_float(sum.at[i]) + to_float(update.at[i]) * scale * gamma[i]);
    store_vector(x, sum);
  });
}

template <typename X, typename Y, int kVector>
__global__ void __launch_bounds__(kTileThreads, ctas_at_half(kTileThreads))
    stochastic_depth_gather_kernel(const GatherParams p) {
  const int64_t column = tile_column<kVector>();
  alignas(16) float gamma[kVector];
  float sums[kVector] = {};
  load_gamma<kVector>(p.gamma, p.channels, gamma);
  for_each_row<kVector>(p.num_rows, p.channels, [&](int64_t row) {
    const int64_t from = p.rows == nullptr ? row : p.rows[row];
    const float scale = p.row_scale == nullptr ? 1.0f : p.row_scale[row];
    const auto dx =
        load_vector<X, kVector>(static_cast<const X*>(p.dx) + from * p.dx_row_stride + column);
    Vector<Y, kVector> residual, g;
    if (p.residual != nullptr)
      residual = load_vector<Y, kVector>(static_cast<const Y*>(p.residual) +
                                         row * p.residual_row_stride + column);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float scaled = to_float(dx.at[i]) * scale;
      sums[i] += p.residual == nullptr ? scaled : scaled * to_float(residual.at[i]);
      from_float(g.at[i], scaled * gamma[i]);
    }
    store_vector(static_cast<Y*>(p.g) + row * p.g_row_stride + column, g);
  });
  if (p.partials != nullptr)
    store_column_sums(sums, p.partials + blockIdx.y * p.channels, p.channels);
}

void scatter(const py::kwargs& a) {
  constexpr const char* op = "stochastic_depth_scatter_cuda";
  const ScatterParams p{pointer<void>(a, "x"),
                        pointer<const void>(a, "residual"),
                        pointer<const int64_t>(a, "rows"),
                        pointer<const float>(a, "row_scale"),
                        pointer<const float>(a, "gamma"),
                        keyword<int64_t>(a, "num_rows"),
                        keyword<int64_t>(a, "channels"),
                        keyword<int64_t>(a, "x_row_stride"),
                        keyword<int64_t>(a, "residual_row_stride")};
  require_not_negative(op, "num_rows", p.num_rows);
  require_not_negative(op, "channels", p.channels);
  require_matrix(op, "x", p.x, p.num_rows, p.channels, p.x_row_stride, true);
  require_matrix(op, "residual", p.residual, p.num_rows, p.channels, p.residual_row_stride, false);
  if (p.num_rows == 0 || p.channels == 0)
    return; // a grid of no blocks is an error to CUDA
  run_stream_in_vectors(
      op, a, "x_dtype", "residual_dtype", p.channels, {{p.x, p.x_row_stride}},
      {{p.residual, p.residual_row_stride}}, {p.gamma}, [&](auto lane, cudaStream_t stream) {
        using L = decltype(lane);
        const dim3 grid = tile_grid(op, p.num_rows, {"channels", p.channels}, L::kVector, 0);
        return launch<stochastic_depth_scatter_kernel<typename L::X, typename L::Y, L::kVector>>(
            grid, tile_block(), 0, stream, p);
      });
}

void gather(const py::kwargs& a) {
  constexpr const char* op = "stochastic_depth_gather_cuda";
  const GatherParams p{pointer<const void>(a, "dx"),
                       pointer<const void>(a, "residual"),
                       pointer<const int64_t>(a, "rows"),
                       pointer<const float>(a, "row_scale"),
                       pointer<const float>(a, "gamma"),
                       pointer<void>(a, "g"),
                       pointer<float>(a, "partials"),
                       keyword<int64_t>(a, "num_rows"),
                       keyword<int64_t>(a, "channels"),
                       keyword<int64_t>(a, "dx_row_stride"),
                       keyword<int64_t>(a, "residual_row_stride"),
                       keyword<int64_t>(a, "g_row_stride")};
  const auto num_partials = keyword<int64_t>(a, "num_partials");
  require_not_negative(op, "num_rows", p.num_rows);
  require_not_negative(op, "channels", p.channels);
  require_matrix(op, "dx", p.dx, p.num_rows, p.channels, p.dx_row_stride, false);
  require_matrix(op, "g", p.g, p.num_rows, p.channels, p.g_row_stride, true);
  if (p.num_rows == 0 || p.channels == 0)
    return;
  require_matrix(op, "residual", p.residual, p.residual == nullptr ? 0 : p.num_rows, p.channels,
                 p.residual_row_stride, false);
  require((p.partials != nullptr) == (num_partials > 0), op,
          "expected partials if and only if there are num_partials");
  run_stream_in_vectors(
      op, a, "dx_dtype", "g_dtype", p.channels, {{p.dx, p.dx_row_stride}},
      {{p.residual, p.residual_row_stride}, {p.g, p.g_row_stride}}, {p.gamma},
      [&](auto lane, cudaStream_t stream) {
        using L = decltype(lane);
        const dim3 grid =
            tile_grid(op, p.num_rows, {"channels", p.channels}, L::kVector, num_partials);
        return launch<stochastic_depth_gather_kernel<typename L::X, typename L::Y, L::kVector>>(
            grid, tile_block(), 0, stream, p);
      });
}

} // namespace
} // namespace dinov2_fast

void bind_stochastic_depth_cuda(py::module_& m) {
  using namespace dinov2_fast;
  m.def(
      "stochastic_depth_scatter_cuda", &scatter,
      "x[rows] += residual * row_scale * gamma; x [T, C], residual [R, C]; pointers (0: all rows, "
      "or ones), sizes and row strides in elements.");
  m.def("stochastic_depth_gather_cuda", &gather,
        "dx [T, C] -> g [R, C] = dx[rows] * row_scale * gamma and, if not 0, partials "
        "[num_partials, C], the sums of dx[rows] * row_scale * residual over rows.");
}
