// The optimizer on CUDA, over whole lists of tensors: AdamW with the teacher's moving average and
// the 16-bit copies of both in one pass over memory, and the gradient norm. Tensors are reached
// through a table of addresses and cut into chunks, one a CTA: a launch serves tensors of any
// number and sizes, and the order of a sum depends on the sizes alone.
#include "adamw.hpp"
#include "check.hpp"
#include "cuda/device/guard.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/limits.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vector.cuh"
#include "keywords.hpp"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kTotalThreads = 1024; // of the one CTA that adds the chunks' sums
constexpr int kVector = 4;          // floats of 16 bytes
constexpr int kParamBytes = 4096;   // what every driver takes as the parameters of a kernel

// Rows of the table.
enum List { kParameters, kGradients, kExpAvgs, kExpAvgSqs, kTeachers, kCopies, kTeacherCopies };

// One array of int64: the addresses of several lists of N tensors (0: no tensor), the N sizes in
// elements, and the number of the first chunk of each tensor.
struct Table {
  const int64_t* addresses; // [lists, N]
  const int64_t* sizes;     // [N]
  const int64_t* chunks;    // [N]
  int num_tensors;          // N
  int chunk;                // elements of a chunk, whole vectors
};

// Part of a table on its way to the device. In the parameters, not in memory of the host: a CUDA
// graph that captures the launch holds a copy of its own, for as long as it lives.
struct TableParams {
  static constexpr int kHeld = (kParamBytes - sizeof(int64_t*) - sizeof(int64_t)) / sizeof(int64_t);
  int64_t* table;
  int64_t count;
  int64_t numbers[kHeld];
};
static_assert(sizeof(TableParams) <= kParamBytes);

struct StepParams {
  Table table;
  const float* scale;     // on the gradients, or null: numbers.gradient_scale
  const bool* skip;       // whether to change nothing, or null
  const double* changing; // [4], or null: those of numbers that `numbers_of_step` names
  AdamW numbers;
  bool copies_are_half; // else bfloat16
};

struct NormParams {
  Table table;
  double* sums; // [num_chunks], of squares
  float* norm;
  int64_t num_chunks;
};

// Part of a tensor, the same for every thread of a CTA.
struct Chunk {
  int tensor;
  int64_t begin;
  int size; // elements
};

__device__ Chunk chunk_of_cta(const Table& t) {
  const int64_t number = blockIdx.x;
  int low = 0, high = t.num_tensors; // an empty tensor begins where the next one does
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (t.chunks[middle] <= number ? low : high) = middle;
  }
  const int64_t begin = (number - t.chunks[low]) * t.chunk;
  return {low, begin, static_cast<int>(min(t.sizes[low] - begin, static_cast<int64_t>(t.chunk)))};
}

// Where a chunk begins in its tensor of a list, or null.
template <typename T> __device__ T* start_of(const Table& t, const Chunk& chunk, List list) {
  const int64_t address = t.addresses[static_cast<int64_t>(list) * t.num_tensors + chunk.tensor];
  return address == 0 ? nullptr : reinterpret_cast<T*>(address) + chunk.begin;
}

// Calls body(place, width as a constant) for the elements of a chunk that are this thread's: in
// vectors, and what is left or everything of unaligned tensors one by one.
template <typename Body> __device__ void for_each_vector(int size, bool aligned, const Body& body) {
  const int whole = aligned ? size / kVector * kVector : 0;
  for (int i = threadIdx.x * kVector; i < whole; i += kThreads * kVector)
    body(i, std::integral_constant<int, kVector>());
  for (int i = whole + threadIdx.x; i < size; i += kThreads)
    body(i, std::integral_constant<int, 1>());
}

template <typename T, int kWidth>
__device__ void store_rounded(T* to, const Vector<float, kWidth>& values) {
  Vector<T, kWidth> rounded;
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    from_float(rounded.at[i], values.at[i]);
  store_vector(to, rounded);
}

// The types have the same size, so the place is the same in either.
template <int kWidth>
__device__ void store_copy(uint16_t* to, int place, bool half,
                           const Vector<float, kWidth>& values) {
  if (to == nullptr)
    return;
  if (half)
    store_rounded(reinterpret_cast<__half*>(to + place), values);
  else
    store_rounded(reinterpret_cast<__nv_bfloat16*>(to + place), values);
}

// Products and sums are fused by hand here and below: left to the compiler, an element of a vector
// would be rounded unlike one alone, and alignment would change bits.
__device__ float lerp(const Lerp& l, float a, float b) {
  return fmaf(l.factor, b - a, l.from_b ? b : a);
}

__global__ void __launch_bounds__(kThreads) optimizer_table_kernel(const TableParams p) {
  for (int i = threadIdx.x; i < p.count; i += kThreads)
    p.table[i] = p.numbers[i];
}

__device__ AdamW numbers_of_step(const StepParams& p) {
  AdamW n = p.numbers;
  if (p.changing != nullptr) {
    n.decay = static_cast<float>(p.changing[0]);
    n.rate = static_cast<float>(-p.changing[1]);
    n.root_correction = static_cast<float>(p.changing[2]);
    n.ema = Lerp(p.changing[3]);
  }
  return n;
}

__global__ void __launch_bounds__(kThreads, ctas_at_half(kThreads))
    optimizer_step_kernel(const StepParams p) {
  if (p.skip != nullptr && *p.skip)
    return;
  const AdamW n = numbers_of_step(p);
  const float scale = p.scale == nullptr ? n.gradient_scale : *p.scale;
  const Chunk chunk = chunk_of_cta(p.table);
  float* parameter = start_of<float>(p.table, chunk, kParameters);
  const float* gradient = start_of<const float>(p.table, chunk, kGradients);
  float* exp_avg = start_of<float>(p.table, chunk, kExpAvgs);
  float* exp_avg_sq = start_of<float>(p.table, chunk, kExpAvgSqs);
  float* teacher = start_of<float>(p.table, chunk, kTeachers);
  uint16_t* copy = start_of<uint16_t>(p.table, chunk, kCopies);
  uint16_t* teacher_copy = start_of<uint16_t>(p.table, chunk, kTeacherCopies);
  const auto bits = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  const uintptr_t of_floats =
      bits(parameter) | bits(gradient) | bits(exp_avg) | bits(exp_avg_sq) | bits(teacher);
  const uintptr_t of_copies = bits(copy) | bits(teacher_copy); // half as wide
  const bool aligned = (of_floats | 2 * of_copies) % kVectorBytes == 0;
  for_each_vector(chunk.size, aligned, [&](int place, auto width) {
    constexpr int kWidth = width();
    const auto g = load_vector<float, kWidth>(gradient + place);
    auto m = load_writable<float, kWidth>(exp_avg + place);
    auto v = load_writable<float, kWidth>(exp_avg_sq + place);
    auto w = load_writable<float, kWidth>(parameter + place);
    Vector<float, kWidth> average = {};
    if (teacher != nullptr)
      average = load_writable<float, kWidth>(teacher + place);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float scaled = __fmul_rn(g.at[i], scale);
      m.at[i] = lerp(n.first_moment, m.at[i], scaled);
      v.at[i] = fmaf(n.one_minus_beta2, scaled * scaled, v.at[i] * n.beta2);
      const float denominator = sqrtf(v.at[i]) / n.root_correction + n.eps;
      w.at[i] = fmaf(n.rate, m.at[i] / denominator, w.at[i] * n.decay);
      average.at[i] = lerp(n.ema, average.at[i], w.at[i]);
    }
    store_vector(exp_avg + place, m);
    store_vector(exp_avg_sq + place, v);
    store_vector(parameter + place, w);
    store_copy(copy, place, p.copies_are_half, w);
    if (teacher != nullptr)
      store_vector(teacher + place, average);
    store_copy(teacher_copy, place, p.copies_are_half, average);
  });
}

// Squares are summed in float64: a float32 sum over millions would lose half its digits.
__global__ void __launch_bounds__(kThreads, ctas_at_half(kThreads))
    optimizer_squares_kernel(const NormParams p) {
  __shared__ double of_warps[kThreads / kLanes][1];
  const Chunk chunk = chunk_of_cta(p.table);
  const float* x = start_of<const float>(p.table, chunk, kParameters);
  double squares[1] = {};
  const bool aligned = reinterpret_cast<uintptr_t>(x) % kVectorBytes == 0;
  for_each_vector(chunk.size, aligned, [&](int place, auto width) {
    const auto values = load_vector<float, width()>(x + place);
#pragma unroll
    for (int i = 0; i < width(); ++i)
      squares[0] += static_cast<double>(values.at[i]) * values.at[i];
  });
  block_reduce<Sum>(squares, of_warps);
  if (threadIdx.x == 0)
    p.sums[blockIdx.x] = squares[0];
}

__global__ void __launch_bounds__(kTotalThreads) optimizer_total_kernel(const NormParams p) {
  __shared__ double of_warps[kTotalThreads / kLanes][1];
  double total[1] = {};
  for (int64_t i = threadIdx.x; i < p.num_chunks; i += kTotalThreads)
    total[0] += p.sums[i];
  block_reduce<Sum>(total, of_warps);
  // As the reference, which sums in float32: the trainer skips a step whose squares overflow it.
  if (threadIdx.x == 0)
    *p.norm = total[0] > FLT_MAX ? INFINITY : static_cast<float>(sqrt(total[0]));
}

// The keywords table, num_tensors, num_chunks and chunk of a function whose table has some lists.
Table table_of(const char* op, const py::kwargs& a, int64_t num_lists) {
  const auto* numbers = pointer<const int64_t>(a, "table");
  constexpr int64_t kMost = int64_t{1} << 30; // of numbers that kernels add two of
  const auto num_tensors = keyword<int64_t>(a, "num_tensors");
  const auto chunk = keyword<int64_t>(a, "chunk"), num_chunks = keyword<int64_t>(a, "num_chunks");
  require_positive(op, "num_tensors", num_tensors);
  require_at_most(op, "num_tensors", num_tensors, kMost);
  require(chunk > 0 && chunk % kVector == 0 && chunk <= kMost, op,
          "chunk must be a multiple of 4 of at most 2^30, got " + std::to_string(chunk));
  require_not_negative(op, "num_chunks", num_chunks);
  require_at_most(op, "num_chunks", num_chunks, kMaxAlongX);
  require_pointer(op, "table", numbers);
  const int64_t* sizes = numbers + num_lists * num_tensors;
  return {numbers, sizes, sizes + num_tensors, static_cast<int>(num_tensors),
          static_cast<int>(chunk)};
}

void optimizer_table(const py::kwargs& a) {
  constexpr const char* op = "optimizer_table_cuda";
  const auto numbers = keyword<std::vector<int64_t>>(a, "numbers");
  auto* table = pointer<int64_t>(a, "table");
  const auto device = keyword<int>(a, "device");
  const auto stream = pointer<CUstream_st>(a, "stream");
  if (!numbers.empty())
    require_pointer(op, "table", table);
  const py::gil_scoped_release release;
  run_on(op, device, [&] {
    TableParams p = {};
    for (size_t begin = 0; begin < numbers.size(); begin += p.count) {
      p.table = table + begin;
      p.count = std::min<int64_t>(TableParams::kHeld, numbers.size() - begin);
      std::copy_n(numbers.begin() + begin, p.count, p.numbers);
      const cudaError_t status =
          launch<optimizer_table_kernel>(dim3(1), dim3(kThreads), 0, stream, p);
      if (status != cudaSuccess)
        return status;
    }
    return cudaSuccess;
  });
}

void optimizer_step(const py::kwargs& a) {
  constexpr const char* op = "optimizer_step_cuda";
  const auto copies_dtype = keyword<std::string>(a, "copies_dtype");
  require(copies_dtype == "float16" || copies_dtype == "bfloat16", op,
          "copies_dtype must be float16 or bfloat16, got " + copies_dtype);
  const StepParams p{table_of(op, a, kTeacherCopies + 1),
                     pointer<const float>(a, "scale"),
                     pointer<const bool>(a, "skip"),
                     pointer<const double>(a, "changing"),
                     adamw_of(op, a),
                     copies_dtype == "float16"};
  const dim3 grid(static_cast<unsigned>(keyword<int64_t>(a, "num_chunks")));
  const auto device = keyword<int>(a, "device");
  const auto stream = pointer<CUstream_st>(a, "stream");
  if (grid.x == 0)
    return; // a grid of no blocks is an error to CUDA
  const py::gil_scoped_release release;
  run_on(op, device,
         [&] { return launch<optimizer_step_kernel>(grid, dim3(kThreads), 0, stream, p); });
}

void optimizer_norm(const py::kwargs& a) {
  constexpr const char* op = "optimizer_norm_cuda";
  const NormParams p{table_of(op, a, 1), pointer<double>(a, "sums"), pointer<float>(a, "norm"),
                     keyword<int64_t>(a, "num_chunks")};
  const auto device = keyword<int>(a, "device");
  const auto stream = pointer<CUstream_st>(a, "stream");
  require_pointer(op, "norm", p.norm);
  if (p.num_chunks > 0)
    require_pointer(op, "sums", p.sums);
  const py::gil_scoped_release release;
  run_on(op, device, [&] {
    const dim3 grid(static_cast<unsigned>(p.num_chunks));
    if (p.num_chunks > 0) {
      const cudaError_t status =
          launch<optimizer_squares_kernel>(grid, dim3(kThreads), 0, stream, p);
      if (status != cudaSuccess)
        return status;
    }
    return launch<optimizer_total_kernel>(dim3(1), dim3(kTotalThreads), 0, stream, p);
  });
}

} // namespace
} // namespace dinov2_fast

void bind_optimizer_cuda(py::module_& m) {
  using namespace dinov2_fast;
  m.def("optimizer_table_cuda", &optimizer_table,
        "Writes a list of numbers to table, int64, without a copy from memory of the host.");
  m.def(
      "optimizer_step_cuda", &optimizer_step,
      "AdamW, the teacher's moving average and 16-bit copies of both, in place. table: int64, the "
      "addresses [7, N] of adjacent float32 (parameters, gradients, exp_avgs, exp_avg_sqs, "
      "teachers or 0) and of copies_dtype (copies, teachers' copies, or 0), sizes [N], first "
      "chunks [N]; num_tensors, num_chunks, chunk; scale and skip: pointers or 0; lr, "
      "weight_decay, beta1, beta2, eps, step, momentum, gradient_scale. changing: 0, or float64 "
      "[4] in place of what the numbers come to: 1 - lr weight_decay, lr / (1 - beta1^step), "
      "sqrt(1 - beta2^step), 1 - momentum.");
  m.def("optimizer_norm_cuda", &optimizer_norm,
        "Euclidean norm of all tensors as one vector, a float32. table: int64, addresses [N] of "
        "adjacent float32, sizes [N], first chunks [N]; num_tensors, num_chunks, chunk; sums "
        "[num_chunks] float64 is scratch.");
}
