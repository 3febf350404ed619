// SwiGLU on CUDA: h = silu(x1) * x2 and its gradient, rows of [x1 | x2] side by side.
#include "check.hpp"
#include "cuda/device/launch.cuh"
#include "cuda/device/run.cuh"
#include "cuda/device/tiles.cuh"
#include "cuda/device/vector.cuh"
#include "keywords.hpp"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

struct Params {
  const void* dh;  // [R, F], backward only; may be h
  const void* x12; // [R, 2F]
  void* dx12;      // [R, 2F], backward only; may be x12
  void* h;         // [R, F], or null in the backward
  float* partials; // [num_partials, 2F] sums of dx12 over rows, or null
  int64_t rows;    // R
  int64_t hidden;  // F
  int64_t dh_row_stride;
  int64_t x12_row_stride;
  int64_t dx12_row_stride;
  int64_t h_row_stride;
};

// Half types keep 8 or 11 bits, so the fast division (2 ulp of float) costs nothing either.
template <typename T> __device__ float sigmoid(float x) {
  const float e = exponential<T>(-fabsf(x));
  const float numerator = x < 0.0f ? e : 1.0f;
  return std::is_same_v<T, float> ? numerator / (1.0f + e) : __fdividef(numerator, 1.0f + e);
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kTileThreads) swiglu_forward_kernel(const Params p) {
  const int64_t column = tile_column<kVector>();
  for_each_row<kVector>(p.rows, p.hidden, [&](int64_t row) {
    const T* x12 = static_cast<const T*>(p.x12) + row * p.x12_row_stride + column;
    const auto x1 = load_vector<T, kVector>(x12);
    const auto x2 = load_vector<T, kVector>(x12 + p.hidden);
    Vector<T, kVector> h;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float gate = to_float(x1.at[i]);
      from_float(h.at[i], gate * sigmoid<T>(gate) * to_float(x2.at[i]));
    }
    store_vector(static_cast<T*>(p.h) + row * p.h_row_stride + column, h);
  });
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kTileThreads) swiglu_backward_kernel(const Params p) {
  const int64_t column = tile_column<kVector>();
  float sums1[kVector] = {}, sums2[kVector] = {};
  for_each_row<kVector>(p.rows, p.hidden, [&](int64_t row) {
    const T* x12 = static_cast<const T*>(p.x12) + row * p.x12_row_stride + column;
    const auto x1 = load_writable<T, kVector>(x12);
    const auto x2 = load_writable<T, kVector>(x12 + p.hidden);
    const auto dh =
        load_writable<T, kVector>(static_cast<const T*>(p.dh) + row * p.dh_row_stride + column);
    Vector<T, kVector> dx1, dx2, h;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float gate = to_float(x1.at[i]), gradient = to_float(dh.at[i]);
      const float value = to_float(x2.at[i]), s = sigmoid<T>(gate);
      const float d1 = gradient * value * (s * (1.0f + gate * (1.0f - s)));
      const float d2 = gradient * (gate * s);
      sums1[i] += d1;
      sums2[i] += d2;
      from_float(dx1.at[i], d1);
      from_float(dx2.at[i], d2);
      from_float(h.at[i], gate * s * value);
    }
    T* dx12 = static_cast<T*>(p.dx12) + row * p.dx12_row_stride + column;
    store_vector(dx12, dx1);
    store_vector(dx12 + p.hidden, dx2);
    if (p.h != nullptr)
      store_vector(static_cast<T*>(p.h) + row * p.h_row_stride + column, h);
  });
  if (p.partials != nullptr) {
    float* partials = p.partials + blockIdx.y * 2 * p.hidden;
    store_column_sums(sums1, partials, p.hidden);
    __syncthreads();
    store_column_sums(sums2, partials + p.hidden, p.hidden);
  }
}

void swiglu_forward(const py::kwargs& a) {
  constexpr const char* op = "swiglu_forward_cuda";
  Params p{};
  p.x12 = pointer<const void>(a, "x12");
  p.h = pointer<void>(a, "h");
  p.rows = keyword<int64_t>(a, "rows");
  p.hidden = keyword<int64_t>(a, "hidden");
  p.x12_row_stride = keyword<int64_t>(a, "x12_row_stride");
  p.h_row_stride = keyword<int64_t>(a, "h_row_stride");
  require_matrix(op, "x12", p.x12, p.rows, 2 * p.hidden, p.x12_row_stride, false);
  require_matrix(op, "h", p.h, p.rows, p.hidden, p.h_row_stride, true);
  run_tiles(op, a, p.rows, {"hidden", p.hidden}, nullptr, 0,
            {{p.x12, p.x12_row_stride}, {p.h, p.h_row_stride}},
            [&](auto lane, dim3 grid, cudaStream_t stream) {
              using L = decltype(lane);
              return launch<swiglu_forward_kernel<typename L::type, L::kVector>>(grid, tile_block(),
                                                                                 0, stream, p);
            });
}

void swiglu_backward(const py::kwargs& a) {
  constexpr const char* op = "swiglu_backward_cuda";
  const Params p{pointer<const void>(a, "dh"),
                 pointer<const void>(a, "x12"),
                 pointer<void>(a, "dx12"),
                 pointer<void>(a, "h"),
                 pointer<float>(a, "partials"),
                 keyword<int64_t>(a, "rows"),
                 keyword<int64_t>(a, "hidden"),
                 keyword<int64_t>(a, "dh_row_stride"),
                 keyword<int64_t>(a, "x12_row_stride"),
                 keyword<int64_t>(a, "dx12_row_stride"),
                 keyword<int64_t>(a, "h_row_stride")};
  require_matrix(op, "x12", p.x12, p.rows, 2 * p.hidden, p.x12_row_stride, false);
  require_matrix(op, "dh", p.dh, p.rows, p.hidden, p.dh_row_stride, false);
  require_matrix(op, "dx12", p.dx12, p.rows, 2 * p.hidden, p.dx12_row_stride, true);
  if (p.h != nullptr)
    require_matrix(op, "h", p.h, p.rows, p.hidden, p.h_row_stride, true);
  // F itself is whole vectors, or x2 would start between two of them.
  run_tiles(op, a, p.rows, {"hidden", p.hidden}, p.partials, keyword<int64_t>(a, "num_partials"),
            {{p.dh, p.dh_row_stride},
             {p.x12, p.x12_row_stride},
             {p.dx12, p.dx12_row_stride},
             {p.h, p.h_row_stride}},
            [&](auto lane, dim3 grid, cudaStream_t stream) {
              using L = decltype(lane);
              return launch<swiglu_backward_kernel<typename L::type, L::kVector>>(
                  grid, tile_block(), 0, stream, p);
            });
}

} // namespace
} // namespace dinov2_fast

void bind_swiglu_cuda(py::module_& m) {
  using namespace dinov2_fast;
  m.def("swiglu_forward_cuda", &swiglu_forward,
        "x12 [R, 2F] -> h [R, F]; pointers, sizes and row strides in elements.");
  m.def("swiglu_backward_cuda", &swiglu_backward,
        "dh [R, F], x12 [R, 2F] -> dx12 [R, 2F], which may be x12; if not 0, h [R, F], which may "
        "be dh, and partials [num_partials, 2F], the sums of dx12 over rows.");
}
