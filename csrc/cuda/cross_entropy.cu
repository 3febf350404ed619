// Cross-entropy on CUDA between student scores and targets that exist only as teacher scores and
// two vectors: target = exp(teacher / temperature + log_u + log_v), one or two teachers a row.
//
// Forward: a CTA has a row, or a part of its columns, and reads it once; a second pass puts the
// parts together. Backward: softmax and targets again, in place if the caller wants.
#include "check.hpp"
#include "cuda/device/launch.cuh"
#include "cuda/device/limits.cuh"
#include "cuda/device/long_rows.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/run.cuh"
#include "cuda/device/types.cuh"
#include "cuda/device/vector.cuh"
#include "keywords.hpp"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

constexpr int kMaxTeachers = 2;

// A number of more than 24 bits: temperatures are small, and their quotients large.
struct Factor {
  float high, rest;
};

struct Params {
  const void* student;         // [S, K]
  const void* teacher;         // [R, K]
  const float* log_u;          // [K]
  const float* log_v;          // [R]
  const int64_t* teacher_rows; // [S, P], -1 is none
  int64_t rows;                // S
  int64_t prototypes;          // K
  int64_t num_teachers;        // P, 1 or 2
  int64_t student_row_stride;
  int64_t teacher_row_stride;
  int64_t split_columns;  // of a CTA
  Factor student_inverse; // 1 / temperature
  Factor teacher_inverse;
  FloatType teacher_type; // no template argument: three times as many kernels save one branch
};

// Of a row or a part of it: what the loss is made of, relative to the largest score.
struct Parts {
  float largest = -INFINITY; // NaN never wins; it comes back in the sums
  float exps = 0.0f;
  float targets = 0.0f;
  float products = 0.0f; // of targets and (score - largest) / temperature
};

struct ForwardParams : Params {
  float* loss;        // [S]
  double* normalizer; // [S] score whose softmax would be 1: temperature * log-sum-exp
  float* target_sum;  // [S]
  Parts* partials;    // [S, num_splits], or null: one part
  int64_t num_splits;
  double student_temperature;
};

struct BackwardParams : Params {
  const float* grad_loss;   // [S]
  const double* normalizer; // [S]
  const float* target_sum;  // [S]
  void* grad;               // [S, K], may be student
  int64_t grad_row_stride;
};

// x * factor; infinity times a rest of 0 or of the other sign would be NaN.
__device__ float rest_of(float x, Factor factor) { return isinf(x) ? 0.0f : x * factor.rest; }
__device__ float times(float x, Factor factor) { return fmaf(x, factor.high, rest_of(x, factor)); }

struct Teachers {
  int64_t row[kMaxTeachers]; // -1 is none
  float log_v[kMaxTeachers];
};

__device__ Teachers teachers_of(const Params& p, int64_t row) {
  Teachers found;
#pragma unroll
  for (int i = 0; i < kMaxTeachers; ++i) {
    found.row[i] = i < p.num_teachers ? p.teacher_rows[row * p.num_teachers + i] : -1;
    found.log_v[i] = found.row[i] < 0 ? 0.0f : p.log_v[found.row[i]];
  }
  return found;
}

// Targets of the columns [k, k + kVector), summed over teachers.
template <int kVector>
__device__ void targets_of(const Params& p, const Teachers& teachers, int64_t k,
                           float (&targets)[kVector]) {
  const auto log_u = load_vector<float, kVector>(p.log_u + k);
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    targets[j] = 0.0f;
#pragma unroll
  for (int i = 0; i < kMaxTeachers; ++i) {
    if (teachers.row[i] < 0)
      continue;
    float scores[kVector];
    load_floats(p.teacher, p.teacher_type, teachers.row[i] * p.teacher_row_stride + k, scores);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      // The two large terms first: their sum is small, and what is added to it rounds little.
      const float small = fmaf(scores[j], p.teacher_inverse.high, teachers.log_v[i]);
      targets[j] += expf(small + (rest_of(scores[j], p.teacher_inverse) + log_u.at[j]));
    }
  }
}

// Moves the sums to a largest score that is not lower.
__device__ void raise_to(Parts& parts, float higher, Factor inverse) {
  // Before the first finite score there is nothing to move, however far that would be.
  const bool empty = parts.largest == -INFINITY;
  const float step = empty ? 0.0f : times(base_of(parts.largest) - base_of(higher), inverse);
  parts.exps *= expf(step);
  parts.products = fmaf(parts.targets, step, parts.products);
  parts.largest = higher;
}

template <typename T, int kVector> __device__ Parts parts_of(const ForwardParams& p, int64_t row) {
  const Teachers teachers = teachers_of(p, row);
  const T* student = static_cast<const T*>(p.student) + row * p.student_row_stride;
  Parts parts;
  for_each_vector<kVector>(p.prototypes, p.split_columns, [&](int64_t k) {
    const auto scores = load_vector<T, kVector>(student + k);
    float targets[kVector], higher = parts.largest;
    targets_of(p, teachers, k, targets);
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      higher = fmaxf(higher, to_float(scores.at[j]));
    raise_to(parts, higher, p.student_inverse);
    const float base = base_of(higher);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float score = times(to_float(scores.at[j]) - base, p.student_inverse);
      parts.exps += exponential<T>(score);
      parts.targets += targets[j];
      parts.products = fmaf(targets[j], score, parts.products);
    }
  });
  return parts;
}

__device__ void store_row(const ForwardParams& p, int64_t row, const Parts& parts) {
  const double log_sum = log(static_cast<double>(parts.exps));
  p.loss[row] = parts.targets * static_cast<float>(log_sum) - parts.products;
  p.normalizer[row] = static_cast<double>(base_of(parts.largest)) + log_sum * p.student_temperature;
  p.target_sum[row] = parts.targets;
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kRowThreads, ctas_at_half(kRowThreads))
    cross_entropy_forward_kernel(const ForwardParams p) {
  __shared__ float largest_of_warps[kRowWarps][1], sums_of_warps[kRowWarps][3];
  const int64_t row = blockIdx.x;
  Parts parts = parts_of<T, kVector>(p, row);
  float largest[1] = {parts.largest};
  block_reduce<Max>(largest, largest_of_warps);
  raise_to(parts, largest[0], p.student_inverse);
  float sums[3] = {parts.exps, parts.targets, parts.products};
  block_reduce<Sum>(sums, sums_of_warps);
  if (threadIdx.x != 0)
    return;
  parts = Parts{largest[0], sums[0], sums[1], sums[2]};
  if (p.num_splits == 1)
    store_row(p, row, parts);
  else
    p.partials[row * p.num_splits + blockIdx.y] = parts;
}

// One warp a row.
__global__ void __launch_bounds__(kRowThreads) cross_entropy_finish_kernel(const ForwardParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kLanes;
  if (row >= p.rows)
    return;
  const Parts* partials = p.partials + row * p.num_splits;
  Parts whole;
  for (int64_t i = threadIdx.x % kLanes; i < p.num_splits; i += kLanes)
    whole.largest = fmaxf(whole.largest, partials[i].largest);
  whole.largest = warp_max(whole.largest);
  for (int64_t i = threadIdx.x % kLanes; i < p.num_splits; i += kLanes) {
    Parts parts = partials[i];
    raise_to(parts, whole.largest, p.student_inverse);
    whole.exps += parts.exps;
    whole.targets += parts.targets;
    whole.products += parts.products;
  }
  whole.exps = warp_sum(whole.exps);
  whole.targets = warp_sum(whole.targets);
  whole.products = warp_sum(whole.products);
  if (threadIdx.x % kLanes == 0)
    store_row(p, row, whole);
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kRowThreads, ctas_at_half(kRowThreads))
    cross_entropy_backward_kernel(const BackwardParams p) {
  const int64_t row = blockIdx.x;
  const Teachers teachers = teachers_of(p, row);
  const T* student = static_cast<const T*>(p.student) + row * p.student_row_stride;
  T* grad = static_cast<T*>(p.grad) + row * p.grad_row_stride;
  // In two floats: its rounding would scale the whole row.
  const float high = static_cast<float>(p.normalizer[row]);
  const float low = static_cast<float>(p.normalizer[row] - static_cast<double>(high));
  const float total = p.target_sum[row], factor = p.grad_loss[row] * p.student_inverse.high;
  for_each_vector<kVector>(p.prototypes, p.split_columns, [&](int64_t k) {
    const auto scores = load_writable<T, kVector>(student + k);
    float targets[kVector];
    targets_of(p, teachers, k, targets);
    Vector<T, kVector> out;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float softmax = expf(times((to_float(scores.at[j]) - high) - low, p.student_inverse));
      from_float(out.at[j], (softmax * total - targets[j]) * factor);
    }
    store_vector(grad + k, out);
  });
}

Factor factor_of(double number) {
  const float high = static_cast<float>(number);
  return {high, static_cast<float>(number - static_cast<double>(high))};
}

// Arguments that both functions take.
void fill(const char* op, Params& p, const py::kwargs& a, int64_t num_splits) {
  p.student = pointer<const void>(a, "student");
  p.teacher = pointer<const void>(a, "teacher");
  p.log_u = pointer<const float>(a, "log_u");
  p.log_v = pointer<const float>(a, "log_v");
  p.teacher_rows = pointer<const int64_t>(a, "teacher_rows");
  p.rows = keyword<int64_t>(a, "rows");
  p.prototypes = keyword<int64_t>(a, "prototypes");
  p.num_teachers = keyword<int64_t>(a, "num_teachers");
  p.student_row_stride = keyword<int64_t>(a, "student_row_stride");
  p.teacher_row_stride = keyword<int64_t>(a, "teacher_row_stride");
  p.split_columns = columns_of_split(p.prototypes, num_splits);
  p.student_inverse = factor_of(1.0 / keyword<double>(a, "student_temperature"));
  p.teacher_inverse = factor_of(1.0 / keyword<double>(a, "teacher_temperature"));
  p.teacher_type = float_type(op, keyword<std::string>(a, "teacher_dtype"));
  require_not_negative(op, "rows", p.rows);
  require_not_negative(op, "prototypes", p.prototypes);
  require(1 <= p.num_teachers && p.num_teachers <= kMaxTeachers, op,
          "num_teachers must be 1 or 2, got " + std::to_string(p.num_teachers));
  require_matrix(op, "student", p.student, p.rows, p.prototypes, p.student_row_stride, false);
  const auto num_teacher_rows = keyword<int64_t>(a, "num_teacher_rows");
  require_not_negative(op, "num_teacher_rows", num_teacher_rows);
  require_matrix(op, "teacher", p.teacher, num_teacher_rows, p.prototypes, p.teacher_row_stride,
                 false);
  if (p.rows > 0)
    require_pointer(op, "teacher_rows", p.teacher_rows);
  if (num_teacher_rows > 0 && p.prototypes > 0)
    require_pointer(op, "log_u", p.log_u);
  if (num_teacher_rows > 0)
    require_pointer(op, "log_v", p.log_v);
}

// Whether what lies beside the student's matrices can be moved in vectors of 4.
bool others_whole(const Params& p) {
  return whole_vectors<float, 4>(p.teacher, p.teacher_row_stride) &&
         whole_vectors<float, 4>(p.log_u, 0);
}

void cross_entropy_forward(const py::kwargs& a) {
  constexpr const char* op = "cross_entropy_forward_cuda";
  ForwardParams p{};
  p.num_splits = keyword<int64_t>(a, "num_splits");
  require_positive(op, "num_splits", p.num_splits);
  fill(op, p, a, p.num_splits);
  p.loss = pointer<float>(a, "loss");
  p.normalizer = pointer<double>(a, "normalizer");
  p.target_sum = pointer<float>(a, "target_sum");
  p.partials = pointer<Parts>(a, "partials");
  p.student_temperature = keyword<double>(a, "student_temperature");
  if (p.rows == 0)
    return; // a grid of no blocks is an error to CUDA
  require_pointer(op, "loss", p.loss);
  require_pointer(op, "normalizer", p.normalizer);
  require_pointer(op, "target_sum", p.target_sum);
  require((p.partials != nullptr) == (p.num_splits > 1), op,
          "expected partials if and only if there are several splits");
  run_in_vectors<float>(
      op, a, p.prototypes, {{p.student, p.student_row_stride}}, others_whole(p),
      [&](auto lane, cudaStream_t stream) {
        using L = decltype(lane);
        const dim3 grid(ctas_of(op, "rows", p.rows, 1, kMaxAlongX),
                        ctas_of(op, "num_splits", p.num_splits, 1, kMaxAlongY));
        const dim3 block = row_block(std::min(p.prototypes, p.split_columns), L::kVector);
        const cudaError_t status =
            launch<cross_entropy_forward_kernel<typename L::type, L::kVector>>(grid, block, 0,
                                                                               stream, p);
        if (p.num_splits == 1 || status != cudaSuccess)
          return status;
        const dim3 finish_grid(ctas_of(op, "rows", p.rows, kRowWarps, kMaxAlongX));
        return launch<cross_entropy_finish_kernel>(finish_grid, dim3(kRowThreads), 0, stream, p);
      });
}

void cross_entropy_backward(const py::kwargs& a) {
  constexpr const char* op = "cross_entropy_backward_cuda";
  BackwardParams p{};
  // Elements are independent here: the shortest parts that give each thread two vectors.
  const int64_t steps = (keyword<int64_t>(a, "prototypes") + kSplitStep - 1) / kSplitStep;
  fill(op, p, a, std::max<int64_t>(steps, 1));
  p.grad_loss = pointer<const float>(a, "grad_loss");
  p.normalizer = pointer<const double>(a, "normalizer");
  p.target_sum = pointer<const float>(a, "target_sum");
  p.grad = pointer<void>(a, "grad");
  p.grad_row_stride = keyword<int64_t>(a, "grad_row_stride");
  require_matrix(op, "grad", p.grad, p.rows, p.prototypes, p.grad_row_stride, true);
  if (p.rows == 0 || p.prototypes == 0)
    return;
  require_pointer(op, "grad_loss", p.grad_loss);
  require_pointer(op, "normalizer", p.normalizer);
  require_pointer(op, "target_sum", p.target_sum);
  run_in_vectors<float>(
      op, a, p.prototypes, {{p.student, p.student_row_stride}, {p.grad, p.grad_row_stride}},
      others_whole(p), [&](auto lane, cudaStream_t stream) {
        using L = decltype(lane);
        return launch<cross_entropy_backward_kernel<typename L::type, L::kVector>>(
            dim3(ctas_of(op, "rows", p.rows, 1, kMaxAlongX),
                 ctas_of(op, "prototypes", p.prototypes, kSplitStep, kMaxAlongY)),
            row_block(std::min(p.prototypes, p.split_columns), L::kVector), 0, stream, p);
      });
}

} // namespace
} // namespace dinov2_fast

void bind_cross_entropy_cuda(py::module_& m) {
  using namespace dinov2_fast;
  m.def("cross_entropy_forward_cuda", &cross_entropy_forward,
        "student [S, K], teacher [R, K], log_u [K], log_v [R], teacher_rows [S, P], partials "
        "[S, num_splits, 4] or, for one, 0 -> loss, normalizer and target_sum [S].");
  m.def("cross_entropy_backward_cuda", &cross_entropy_backward,
        "As forward, with grad_loss, normalizer and target_sum [S] -> grad [S, K], which may be "
        "student.");
}
