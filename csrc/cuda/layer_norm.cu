// Layer norm of gathered rows, and its gradient added to those rows in place.
#include "check.hpp"
#include "cuda/device/launch.cuh"
#include "cuda/device/limits.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/run.cuh"
#include "cuda/device/types.cuh"
#include "cuda/device/vector.cuh"
#include "keywords.hpp"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

constexpr int kForwardRows = 4; // warps of a CTA, each with a row of its own
constexpr int kBackwardThreads = 256;
constexpr int kBackwardWarps = kBackwardThreads / kLanes;
constexpr int64_t kMaxChannels = 8192; // 16 bytes of shared memory each in the backward

struct ForwardParams {
  const void* x;       // [T, C]
  const float* weight; // [C]
  const float* bias;   // [C]
  const int64_t* rows; // [R], or null: all
  void* y;             // [R, C]
  float* mean;         // [R], or null
  float* rstd;         // [R]
  int64_t num_rows;    // R
  int64_t channels;    // C
  int64_t x_row_stride;
  int64_t y_row_stride;
  float eps;
};

struct BackwardParams {
  const void* dy;             // [R, C]
  const void* source;         // [R, C] output or normalised rows; [T, C] input with a mean
  const float* mean;          // [R], or null: source is no input
  const float* rstd;          // [R]
  const float* weight;        // [C]
  const float* bias;          // [C], or null: source is no output
  const int64_t* source_rows; // [R], or null: all
  const int64_t* dx_rows;     // [R], or null: all
  void* dx;                   // added to, or written
  float* partials;            // [CTAs, 2, C]: gradients of weight and bias
  int64_t num_rows;           // R
  int64_t channels;           // C
  int64_t dy_row_stride;
  int64_t source_row_stride;
  int64_t dx_row_stride;
  bool add;
};

// One warp a row. A lane keeps its part of the row in shared memory, which nobody else touches.
template <typename X, typename Y, int kVector>
__global__ void __launch_bounds__(kLanes* kForwardRows, ctas_at_half(kLanes* kForwardRows))
    layer_norm_forward_kernel(const ForwardParams p) {
  extern __shared__ float4 shared[];
  float* kept = reinterpret_cast<float*>(shared) + threadIdx.y * p.channels;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.num_rows)
    return;
  const int64_t from = p.rows == nullptr ? row : p.rows[row];
  const X* x = static_cast<const X*>(p.x) + from * p.x_row_stride;
  const int channels = static_cast<int>(p.channels), first = threadIdx.x * kVector;
  alignas(16) float values[kVector];
  float sum = 0.0f;
  for (int c = first; c < channels; c += kLanes * kVector) {
    const auto loaded = load_vector<X, kVector>(x + c);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      sum += values[i] = to_float(loaded.at[i]);
    copy_floats<kVector>(kept + c, values);
  }
  const float mean = warp_sum(sum) / channels;
  sum = 0.0f;
  for (int c = first; c < channels; c += kLanes * kVector) {
    copy_floats<kVector>(values, kept + c);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      sum += (values[i] - mean) * (values[i] - mean);
  }
  const float rstd = 1.0f / sqrtf(warp_sum(sum) / channels + p.eps);
  Y* y = static_cast<Y*>(p.y) + row * p.y_row_stride;
  alignas(16) float weight[kVector], bias[kVector];
  for (int c = first; c < channels; c += kLanes * kVector) {
    copy_floats<kVector>(values, kept + c);
    copy_floats<kVector>(weight, p.weight + c);
    copy_floats<kVector>(bias, p.bias + c);
    Vector<Y, kVector> out;
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      from_float(out.at[i], (values[i] - mean) * rstd * weight[i] + bias[i]);
    store_vector(y + c, out);
  }
  if (threadIdx.x == 0) {
    p.rstd[row] = rstd;
    if (p.mean != nullptr)
      p.mean[row] = mean;
  }
}

// x_hat of a vector of a source row.
template <typename Y, int kVector>
__device__ void normalised(const BackwardParams& p, const Y* source, int c, float mean, float scale,
                           float (&x_hat)[kVector]) {
  alignas(16) float weight[kVector], bias[kVector];
  const auto loaded = load_vector<Y, kVector>(source + c);
  if (p.bias != nullptr) {
    copy_floats<kVector>(weight, p.weight + c);
    copy_floats<kVector>(bias, p.bias + c);
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    x_hat[i] = (to_float(loaded.at[i]) - mean) * scale;
    if (p.bias != nullptr)
      x_hat[i] = (x_hat[i] - bias[i]) / weight[i];
  }
}

// One CTA a row at a time. A thread keeps its part of the row and its sums over rows in shared
// memory, which nobody else touches.
template <typename X, typename Y, int kVector>
__global__ void __launch_bounds__(kBackwardThreads, ctas_at_half(kBackwardThreads))
    layer_norm_backward_kernel(const BackwardParams p) {
  extern __shared__ float4 shared[];
  // Two buffers: that of the row before is not written again until all warps have passed this row's
  // barrier, so one barrier a row is enough.
  alignas(8) __shared__ float of_warps[2][kBackwardWarps][2];
  const int channels = static_cast<int>(p.channels);
  const int first = threadIdx.x * kVector, step = blockDim.x * kVector;
  float* kept_g = reinterpret_cast<float*>(shared);
  float *kept_x_hat = kept_g + channels, *dweight = kept_x_hat + channels;
  float* dbias = dweight + channels;
  alignas(16) float g[kVector], x_hat[kVector], weight[kVector], sum[kVector] = {};
  for (int c = first; c < channels; c += step) {
    copy_floats<kVector>(dweight + c, sum);
    copy_floats<kVector>(dbias + c, sum);
  }
  int buffer = 0;
  for (int64_t row = blockIdx.x; row < p.num_rows; row += gridDim.x, buffer ^= 1) {
    const int64_t from = p.source_rows == nullptr ? row : p.source_rows[row];
    const int64_t to = p.dx_rows == nullptr ? row : p.dx_rows[row];
    const Y* dy = static_cast<const Y*>(p.dy) + row * p.dy_row_stride;
    const Y* source = static_cast<const Y*>(p.source) + from * p.source_row_stride;
    X* dx = static_cast<X*>(p.dx) + to * p.dx_row_stride;
    const float rstd = p.rstd[row];
    const float mean = p.mean == nullptr ? 0.0f : p.mean[row];
    const float scale = p.mean == nullptr ? 1.0f : rstd;
    float sums[2] = {}; // of g and of g * x_hat
    for (int c = first; c < channels; c += step) {
      normalised<Y, kVector>(p, source, c, mean, scale, x_hat);
      const auto incoming = load_vector<Y, kVector>(dy + c);
      copy_floats<kVector>(weight, p.weight + c);
      copy_floats<kVector>(sum, dweight + c);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        g[i] = to_float(incoming.at[i]);
        sum[i] += g[i] * x_hat[i];
      }
      copy_floats<kVector>(dweight + c, sum);
      copy_floats<kVector>(sum, dbias + c);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        sum[i] += g[i];
        g[i] *= weight[i];
        sums[0] += g[i];
        sums[1] += g[i] * x_hat[i];
      }
      copy_floats<kVector>(dbias + c, sum);
      copy_floats<kVector>(kept_g + c, g);
      copy_floats<kVector>(kept_x_hat + c, x_hat);
    }
    block_reduce<Sum>(sums, of_warps[buffer]);
    const float mean_g = sums[0] / channels, along = sums[1] / channels;
    // A row of one channel is its own mean: only a rounding error would be scaled up.
    const float outer = channels == 1 ? 0.0f : rstd;
    for (int c = first; c < channels; c += step) {
      copy_floats<kVector>(g, kept_g + c);
      copy_floats<kVector>(x_hat, kept_x_hat + c);
      Vector<X, kVector> out;
      if (p.add)
        out = load_writable<X, kVector>(dx + c);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float change = outer * (g[i] - mean_g - x_hat[i] * along);
        from_float(out.at[i], p.add ? to_float(out.at[i]) + change : change);
      }
      store_vector(dx + c, out);
    }
  }
  float* partials = p.partials + static_cast<int64_t>(blockIdx.x) * 2 * channels;
  for (int c = first; c < channels; c += step) {
    copy_floats<kVector>(partials + c, dweight + c);
    copy_floats<kVector>(partials + channels + c, dbias + c);
  }
}

template <typename X, typename Y, int kVector>
cudaError_t launch_forward(const char* op, const ForwardParams& p, cudaStream_t stream) {
  const int64_t row_bytes = p.channels * sizeof(float);
  const int64_t rows = std::clamp<int64_t>(kSharedBytesWithoutOptIn / row_bytes, 1, kForwardRows);
  const dim3 block(kLanes, static_cast<unsigned>(rows));
  const dim3 grid(ctas_of(op, "num_rows", p.num_rows, rows, kMaxAlongX));
  return launch<layer_norm_forward_kernel<X, Y, kVector>>(grid, block, rows * row_bytes, stream, p);
}

template <typename X, typename Y, int kVector>
cudaError_t launch_backward(const char* op, const BackwardParams& p, int64_t num_partials,
                            cudaStream_t stream) {
  const int64_t lanes = (p.channels + kVector - 1) / kVector;
  const int64_t warps = std::min<int64_t>((lanes + kLanes - 1) / kLanes, kBackwardWarps);
  return launch<layer_norm_backward_kernel<X, Y, kVector>>(
      dim3(ctas_of(op, "num_partials", num_partials, 1, kMaxAlongX)),
      dim3(static_cast<unsigned>(warps * kLanes)), 4 * p.channels * sizeof(float), stream, p);
}

void require_channels(const char* op, int64_t channels) {
  require_positive(op, "channels", channels);
  require_at_most(op, "channels", channels, kMaxChannels);
}

void layer_norm_forward(const py::kwargs& a) {
  constexpr const char* op = "layer_norm_forward_cuda";
  const ForwardParams p{pointer<const void>(a, "x"),
                        pointer<const float>(a, "weight"),
                        pointer<const float>(a, "bias"),
                        pointer<const int64_t>(a, "rows"),
                        pointer<void>(a, "y"),
                        pointer<float>(a, "mean"),
                        pointer<float>(a, "rstd"),
                        keyword<int64_t>(a, "num_rows"),
                        keyword<int64_t>(a, "channels"),
                        keyword<int64_t>(a, "x_row_stride"),
                        keyword<int64_t>(a, "y_row_stride"),
                        keyword<float>(a, "eps")};
  require_not_negative(op, "num_rows", p.num_rows);
  require_channels(op, p.channels);
  require_matrix(op, "x", p.x, p.num_rows, p.channels, p.x_row_stride, false);
  require_matrix(op, "y", p.y, p.num_rows, p.channels, p.y_row_stride, true);
  if (p.num_rows == 0)
    return; // a grid of no blocks is an error to CUDA
  require_pointer(op, "weight", p.weight);
  require_pointer(op, "bias", p.bias);
  require_pointer(op, "rstd", p.rstd);
  run_stream_in_vectors(
      op, a, "x_dtype", "y_dtype", p.channels, {{p.x, p.x_row_stride}}, {{p.y, p.y_row_stride}},
      {p.weight, p.bias}, [&](auto lane, cudaStream_t stream) {
        using L = decltype(lane);
        return launch_forward<typename L::X, typename L::Y, L::kVector>(op, p, stream);
      });
}

void layer_norm_backward(const py::kwargs& a) {
  constexpr const char* op = "layer_norm_backward_cuda";
  const BackwardParams p{pointer<const void>(a, "dy"),
                         pointer<const void>(a, "source"),
                         pointer<const float>(a, "mean"),
                         pointer<const float>(a, "rstd"),
                         pointer<const float>(a, "weight"),
                         pointer<const float>(a, "bias"),
                         pointer<const int64_t>(a, "source_rows"),
                         pointer<const int64_t>(a, "dx_rows"),
                         pointer<void>(a, "dx"),
                         pointer<float>(a, "partials"),
                         keyword<int64_t>(a, "num_rows"),
                         keyword<int64_t>(a, "channels"),
                         keyword<int64_t>(a, "dy_row_stride"),
                         keyword<int64_t>(a, "source_row_stride"),
                         keyword<int64_t>(a, "dx_row_stride"),
                         keyword<bool>(a, "add")};
  const auto num_partials = keyword<int64_t>(a, "num_partials");
  require_not_negative(op, "num_rows", p.num_rows);
  require_channels(op, p.channels);
  require_matrix(op, "dy", p.dy, p.num_rows, p.channels, p.dy_row_stride, false);
  require_matrix(op, "source", p.source, p.num_rows, p.channels, p.source_row_stride, false);
  require_matrix(op, "dx", p.dx, p.num_rows, p.channels, p.dx_row_stride, true);
  if (p.num_rows == 0)
    return;
  require_positive(op, "num_partials", num_partials);
  require_pointer(op, "weight", p.weight);
  require_pointer(op, "rstd", p.rstd);
  require_pointer(op, "partials", p.partials);
  run_stream_in_vectors(op, a, "dx_dtype", "dy_dtype", p.channels, {{p.dx, p.dx_row_stride}},
                        {{p.dy, p.dy_row_stride}, {p.source, p.source_row_stride}},
                        {p.weight, p.bias, p.partials}, [&](auto lane, cudaStream_t stream) {
                          using L = decltype(lane);
                          return launch_backward<typename L::X, typename L::Y, L::kVector>(
                              op, p, num_partials, stream);
                        });
}

} // namespace
} // namespace dinov2_fast

void bind_layer_norm_cuda(py::module_& m) {
  using namespace dinov2_fast;
  m.def("layer_norm_forward_cuda", &layer_norm_forward,
        "x [T, C], weight and bias [C] float32, rows [R] int64 or 0 -> y [R, C], mean [R] or 0 and "
        "rstd [R] float32; pointers, sizes and row strides in elements.");
  m.def("layer_norm_backward_cuda", &layer_norm_backward,
        "dy [R, C], source of its type: output with bias, input with mean, else normalised rows -> "
        "dx, overwritten or added to, and partials [num_partials, 2, C] of weight and bias.");
}
