// SwiGLU on CUDA: h = silu(x1) * x2 and its gradient, rows of [x1 | x2] side by side.
#include "check.hpp"
#include "cuda/device/guard.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/vector.cuh"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;
constexpr int64_t kMaxGridY = 65535;

struct Params {
  const void* dh;         // [R, F], backward only
  const void* x12;        // [R, 2F]
  void* out;              // forward h [R, F], backward dx12 [R, 2F]
  int64_t rows;           // R
  int64_t hidden;         // F
  int64_t dh_row_stride;  // elements
  int64_t x12_row_stride; // elements
  int64_t out_row_stride; // elements
};

// Half types keep 8 or 11 bits, so the fast exponential and division (2 ulp of float) cost nothing.
template <typename T> __device__ float sigmoid(float x) {
  const float e = std::is_same_v<T, float> ? expf(-fabsf(x)) : __expf(-fabsf(x));
  const float numerator = x < 0.0f ? e : 1.0f;
  return std::is_same_v<T, float> ? numerator / (1.0f + e) : __fdividef(numerator, 1.0f + e);
}

// Threads along x take vectors of a row, threads along y rows; both advance by the grid's size.
template <typename T, int kVector, typename Body>
__device__ void for_each_vector(const Params& p, const Body& body) {
  const int64_t vectors = p.hidden / kVector;
  const int64_t row_step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  const int64_t column_step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < p.rows;
       row += row_step)
    for (int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
         column < vectors; column += column_step)
      body(row, column * kVector);
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) swiglu_forward_kernel(const Params p) {
  using V = Vector<T, kVector>;
  for_each_vector<T, kVector>(p, [&](int64_t row, int64_t column) {
    const T* x12 = static_cast<const T*>(p.x12) + row * p.x12_row_stride + column;
    const V x1 = load_vector<T, kVector>(x12);
    const V x2 = load_vector<T, kVector>(x12 + p.hidden);
    V h;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float gate = to_float(x1.at[i]);
      from_float(h.at[i], gate * sigmoid<T>(gate) * to_float(x2.at[i]));
    }
    store_vector(static_cast<T*>(p.out) + row * p.out_row_stride + column, h);
  });
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) swiglu_backward_kernel(const Params p) {
  using V = Vector<T, kVector>;
  for_each_vector<T, kVector>(p, [&](int64_t row, int64_t column) {
    const T* x12 = static_cast<const T*>(p.x12) + row * p.x12_row_stride + column;
    const V x1 = load_vector<T, kVector>(x12);
    const V x2 = load_vector<T, kVector>(x12 + p.hidden);
    const V dh =
        load_vector<T, kVector>(static_cast<const T*>(p.dh) + row * p.dh_row_stride + column);
    V dx1, dx2;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float gate = to_float(x1.at[i]), gradient = to_float(dh.at[i]);
      const float s = sigmoid<T>(gate);
      from_float(dx1.at[i], gradient * to_float(x2.at[i]) * (s * (1.0f + gate * (1.0f - s))));
      from_float(dx2.at[i], gradient * (gate * s));
    }
    T* dx12 = static_cast<T*>(p.out) + row * p.out_row_stride + column;
    store_vector(dx12, dx1);
    store_vector(dx12 + p.hidden, dx2);
  });
}

// Whether every vector of every row starts at a multiple of 16 bytes. Then no row has a tail: F is
// whole vectors, or x2 would start between two of them.
template <typename T> bool whole_vectors(const Params& p) {
  constexpr int64_t kVector = kVectorBytes / sizeof(T);
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
  };
  return p.hidden % kVector == 0 && p.dh_row_stride % kVector == 0 &&
         p.x12_row_stride % kVector == 0 && p.out_row_stride % kVector == 0 && aligned(p.dh) &&
         aligned(p.x12) && aligned(p.out);
}

template <typename T, int kVector>
cudaError_t launch_width(const Params& p, bool forward, cudaStream_t stream) {
  const int64_t vectors = p.hidden / kVector;
  unsigned x = 1;
  while (x < kThreads && x < vectors)
    x *= 2;
  const dim3 block(x, kThreads / x);
  const int64_t grid_x = std::min<int64_t>((vectors + block.x - 1) / block.x, 1 << 20);
  const int64_t grid_y = std::min<int64_t>((p.rows + block.y - 1) / block.y, kMaxGridY);
  const dim3 grid(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y));
  return forward ? launch<swiglu_forward_kernel<T, kVector>>(grid, block, 0, stream, p)
                 : launch<swiglu_backward_kernel<T, kVector>>(grid, block, 0, stream, p);
}

template <typename T> cudaError_t launch_type(const Params& p, bool forward, cudaStream_t stream) {
  if (whole_vectors<T>(p))
    return launch_width<T, kVectorBytes / sizeof(T)>(p, forward, stream);
  return launch_width<T, 1>(p, forward, stream);
}

cudaError_t swiglu(const Params& p, bool forward, const std::string& dtype, cudaStream_t stream) {
  if (dtype == "float32")
    return launch_type<float>(p, forward, stream);
  if (dtype == "float16")
    return launch_type<__half>(p, forward, stream);
  return launch_type<__nv_bfloat16>(p, forward, stream);
}

void check_and_run(const char* op, const Params& p, bool forward, const std::string& dtype,
                   int device, uintptr_t stream) {
  require(p.rows >= 0, op, "rows must not be negative, got " + std::to_string(p.rows));
  require(p.hidden >= 0, op, "hidden must not be negative, got " + std::to_string(p.hidden));
  require(dtype == "float32" || dtype == "float16" || dtype == "bfloat16", op,
          "expected float32, float16 or bfloat16, got " + dtype);
  if (p.rows == 0 || p.hidden == 0)
    return; // a grid of no blocks is an error to CUDA
  const DeviceGuard guard(device);
  cudaError_t status = guard.status();
  if (status == cudaSuccess)
    status = swiglu(p, forward, dtype, reinterpret_cast<cudaStream_t>(stream));
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

void swiglu_forward(uintptr_t x12, uintptr_t h, int64_t rows, int64_t hidden,
                    int64_t x12_row_stride, int64_t h_row_stride, const std::string& dtype,
                    int device, uintptr_t stream) {
  constexpr const char* op = "swiglu_forward_cuda";
  const Params p{nullptr,
                 reinterpret_cast<const void*>(x12),
                 reinterpret_cast<void*>(h),
                 rows,
                 hidden,
                 0,
                 x12_row_stride,
                 h_row_stride};
  require_matrix(op, "x12", p.x12, rows, 2 * hidden, x12_row_stride, false);
  require_matrix(op, "h", p.out, rows, hidden, h_row_stride, true);
  check_and_run(op, p, true, dtype, device, stream);
}

void swiglu_backward(uintptr_t dh, uintptr_t x12, uintptr_t dx12, int64_t rows, int64_t hidden,
                     int64_t dh_row_stride, int64_t x12_row_stride, int64_t dx12_row_stride,
                     const std::string& dtype, int device, uintptr_t stream) {
  constexpr const char* op = "swiglu_backward_cuda";
  const Params p{reinterpret_cast<const void*>(dh),
                 reinterpret_cast<const void*>(x12),
                 reinterpret_cast<void*>(dx12),
                 rows,
                 hidden,
                 dh_row_stride,
                 x12_row_stride,
                 dx12_row_stride};
  require_matrix(op, "dh", p.dh, rows, hidden, dh_row_stride, false);
  require_matrix(op, "x12", p.x12, rows, 2 * hidden, x12_row_stride, false);
  require_matrix(op, "dx12", p.out, rows, 2 * hidden, dx12_row_stride, true);
  check_and_run(op, p, false, dtype, device, stream);
}

} // namespace
} // namespace dinov2_fast

void bind_swiglu_cuda(py::module_& m) {
  using namespace dinov2_fast;
  m.def("swiglu_forward_cuda", &swiglu_forward,
        "x12 [R, 2F] -> h [R, F]; pointers, sizes and row strides in elements.", py::arg("x12"),
        py::arg("h"), py::arg("rows"), py::arg("hidden"), py::arg("x12_row_stride"),
        py::arg("h_row_stride"), py::arg("dtype"), py::arg("device"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
  m.def("swiglu_backward_cuda", &swiglu_backward,
        "dh [R, F], x12 [R, 2F] -> dx12 [R, 2F]; pointers, sizes and row strides in elements.",
        py::arg("dh"), py::arg("x12"), py::arg("dx12"), py::arg("rows"), py::arg("hidden"),
        py::arg("dh_row_stride"), py::arg("x12_row_stride"), py::arg("dx12_row_stride"),
        py::arg("dtype"), py::arg("device"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
}
