// Cross-entropy on the CPU between student scores and targets that exist only as teacher scores
// and two vectors: target = exp(teacher / temperature + log_u + log_v), one or two teachers a row.
//
// Per row: the largest score, then sum(exp), sum(target) and sum(target * score) relative to it
// in one pass; sums are kept per block of columns and added in double, so K does not spoil them.
#include "check.hpp"
#include "cpu/exp_any.hpp"
#include "cpu/rows.hpp"
#include "keywords.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

constexpr int64_t kColumns = 1024; // columns of a block: its scores, targets and log_u fit in L1

struct Params {
  const void* student;         // [S, K]
  const void* teacher;         // [R, K]
  const float* log_u;          // [K]
  const float* log_v;          // [R]
  const int64_t* teacher_rows; // [S, P], -1 is none
  int64_t rows;                // S
  int64_t prototypes;          // K
  int64_t num_teacher_rows;    // R
  int64_t num_teachers;        // P, 1 or 2
  int64_t student_row_stride;  // elements
  int64_t teacher_row_stride;
  float student_scale; // 1 / temperature
  float teacher_scale;
};

struct Forward : Params {
  float* loss;        // [S]
  double* normalizer; // [S] score whose softmax would be 1: temperature * log-sum-exp
  float* target_sum;  // [S]
};

struct Backward : Params {
  const float* grad_loss;   // [S]
  const double* normalizer; // [S]
  const float* target_sum;  // [S]
  void* grad;               // [S, K]
  int64_t grad_row_stride;
};

struct InPlace : Params {
  float* logits;            // [S, K] the student's; gradient of the weighted sum of losses out
  const float* row_weights; // [S]
  float* loss;              // [S]
  float* scratch;           // [slots, K]
  int64_t slots;
};

// What a row's teachers are: up to two rows of scores and their log_v.
template <typename T> struct Teachers {
  const T* row[2];
  float log_v[2];
};

template <typename T>
[[gnu::always_inline]] inline Teachers<T> teachers_of(const Params& p, int64_t row) {
  Teachers<T> found{{nullptr, nullptr}, {0.0f, 0.0f}};
  int count = 0;
  for (int64_t i = 0; i < p.num_teachers; ++i) {
    const int64_t index = p.teacher_rows[row * p.num_teachers + i];
    if (index < 0)
      continue;
    found.row[count] = static_cast<const T*>(p.teacher) + index * p.teacher_row_stride;
    found.log_v[count++] = p.log_v[index];
  }
  return found;
}

// Targets of columns [begin, begin + count) into `out`.
template <typename T>
[[gnu::always_inline]] inline void targets_of(const Params& p, const Teachers<T>& teachers,
                                              int64_t begin, int64_t count, float* __restrict out) {
  const float* __restrict log_u = p.log_u + begin;
  const float scale = p.teacher_scale, first_v = teachers.log_v[0], second_v = teachers.log_v[1];
  if (teachers.row[0] == nullptr) {
    std::fill(out, out + count, 0.0f);
    return;
  }
  const T* __restrict first = teachers.row[0] + begin;
  if (teachers.row[1] == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      out[i] = exp_any(load(first[i]) * scale + (log_u[i] + first_v));
    return;
  }
  const T* __restrict second = teachers.row[1] + begin;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    out[i] = exp_any(load(first[i]) * scale + (log_u[i] + first_v)) +
             exp_any(load(second[i]) * scale + (log_u[i] + second_v));
}

template <typename T>
[[gnu::always_inline]] inline float largest_of(const T* __restrict x, int64_t count) {
  float largest = -INFINITY; // NaN never wins; it comes back in the sums
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) {
    const float value = load(x[i]);
    largest = value > largest ? value : largest;
  }
  return largest;
}

struct Sums {
  double exps = 0.0, targets = 0.0, products = 0.0;
};

// One block of columns: adds to the sums; keeps exp(score - largest) in `exps` if it is given.
template <bool keep, typename T>
[[gnu::always_inline]] inline void add_block(const T* __restrict x, const float* __restrict targets,
                                             float* __restrict exps, int64_t count, float largest,
                                             float scale, Sums& sums) {
  float e_sum = 0.0f, t_sum = 0.0f, product_sum = 0.0f;
#pragma omp simd reduction(+ : e_sum, t_sum, product_sum)
  for (int64_t i = 0; i < count; ++i) {
    const float score = (load(x[i]) - largest) * scale;
    const float e = exp_normal_or_zero(score), target = targets[i];
    e_sum += e;
    t_sum += target;
    product_sum += target * score;
    if (keep)
      exps[i] = e;
  }
  sums.exps += static_cast<double>(e_sum);
  sums.targets += static_cast<double>(t_sum);
  sums.products += static_cast<double>(product_sum);
}

template <typename S, typename T>
[[gnu::always_inline]] inline void rows_of(const Forward& p, int64_t begin, int64_t end) {
  alignas(64) float targets[kColumns];
  for (int64_t row = begin; row < end; ++row) {
    const S* x = static_cast<const S*>(p.student) + row * p.student_row_stride;
    const Teachers<T> teachers = teachers_of<T>(p, row);
    const float largest = largest_of(x, p.prototypes);
    Sums sums;
    for (int64_t k = 0; k < p.prototypes; k += kColumns) {
      const int64_t count = std::min(kColumns, p.prototypes - k);
      targets_of(p, teachers, k, count, targets);
      add_block<false>(x + k, targets, nullptr, count, largest, p.student_scale, sums);
    }
    const double log_sum = std::log(sums.exps);
    p.loss[row] = static_cast<float>(log_sum * sums.targets - sums.products);
    p.normalizer[row] =
        static_cast<double>(largest) + log_sum / static_cast<double>(p.student_scale);
    p.target_sum[row] = static_cast<float>(sums.targets);
  }
}

template <typename S, typename T>
[[gnu::always_inline]] inline void rows_of(const Backward& p, int64_t begin, int64_t end) {
  alignas(64) float targets[kColumns];
  const float scale = p.student_scale;
  for (int64_t row = begin; row < end; ++row) {
    const S* student = static_cast<const S*>(p.student) + row * p.student_row_stride;
    S* gradient = static_cast<S*>(p.grad) + row * p.grad_row_stride;
    const Teachers<T> teachers = teachers_of<T>(p, row);
    const float total = p.target_sum[row], factor = p.grad_loss[row] * scale;
    // In two floats: its rounding would scale the whole row.
    const float high = static_cast<float>(p.normalizer[row]);
    const float low = static_cast<float>(p.normalizer[row] - static_cast<double>(high));
    for (int64_t k = 0; k < p.prototypes; k += kColumns) {
      const int64_t count = std::min(kColumns, p.prototypes - k);
      targets_of(p, teachers, k, count, targets);
      const S* __restrict x = student + k;
      S* __restrict out = gradient + k;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const float softmax = exp_normal_or_zero(((load(x[i]) - high) - low) * scale);
        store(out[i], (softmax * total - targets[i]) * factor);
      }
    }
  }
}

template <typename S, typename T>
[[gnu::always_inline]] inline void rows_of(const InPlace& p, int64_t begin, int64_t end) {
  for (int64_t slot = begin; slot < end; ++slot) {
    float* __restrict targets = p.scratch + slot * p.prototypes;
    const int64_t last = p.rows * (slot + 1) / p.slots;
    for (int64_t row = p.rows * slot / p.slots; row < last; ++row) {
      float* __restrict x = p.logits + row * p.student_row_stride;
      const Teachers<T> teachers = teachers_of<T>(p, row);
      const float largest = largest_of(x, p.prototypes);
      Sums sums;
      for (int64_t k = 0; k < p.prototypes; k += kColumns) {
        const int64_t count = std::min(kColumns, p.prototypes - k);
        targets_of(p, teachers, k, count, targets + k);
        alignas(64) float exps[kColumns];
        add_block<true>(x + k, targets + k, exps, count, largest, p.student_scale, sums);
        std::copy(exps, exps + count, x + k);
      }
      p.loss[row] = static_cast<float>(std::log(sums.exps) * sums.targets - sums.products);
      const float factor = p.row_weights[row] * p.student_scale;
      const float share = static_cast<float>(sums.targets / sums.exps);
#pragma omp simd
      for (int64_t k = 0; k < p.prototypes; ++k)
        x[k] = (x[k] * share - targets[k]) * factor;
    }
  }
}

template <typename S, typename T, typename P>
void rows_baseline(const P& p, int64_t begin, int64_t end) {
  rows_of<S, T>(p, begin, end);
}

#if defined(__x86_64__)
template <typename S, typename T, typename P>
[[gnu::target("avx2,fma")]] void rows_avx2(const P& p, int64_t begin, int64_t end) {
  rows_of<S, T>(p, begin, end);
}

template <typename S, typename T, typename P>
[[gnu::target("avx512f,avx512bw,avx512dq,avx512vl,fma")]] void
rows_avx512(const P& p, int64_t begin, int64_t end) {
  rows_of<S, T>(p, begin, end);
}
#endif

template <typename S, typename T, typename P>
void run(const P& p, int64_t ranges, int64_t width, int threads, Level level) {
  auto* body = rows_baseline<S, T, P>;
#if defined(__x86_64__)
  if (level == Level::avx2)
    body = rows_avx2<S, T, P>;
  if (level >= Level::avx512)
    body = rows_avx512<S, T, P>;
#else
  (void)level;
#endif
  parallel_rows(ranges, width, threads, [&](int64_t begin, int64_t end) { body(p, begin, end); });
}

// By the teacher's type; `ranges` items of `width` elements each are spread over the threads.
template <typename S, typename P>
void with_teacher(const char* op, const P& p, int64_t ranges, int64_t width,
                  const std::string& dtype, int threads, Level level) {
  if (dtype == "float32")
    run<S, float>(p, ranges, width, threads, level);
  else if (dtype == "bfloat16")
    run<S, bfloat16>(p, ranges, width, threads, level);
  else if (dtype == "float16")
    run<S, float16>(p, ranges, width, threads, level);
  else
    throw py::value_error(std::string(op) +
                          ": teacher: expected float32, bfloat16 or float16, got " + dtype);
}

template <typename P>
void launch(const char* op, const P& p, const std::string& student_dtype,
            const std::string& teacher_dtype, int threads, Level level) {
  if (student_dtype == "float32")
    with_teacher<float>(op, p, p.rows, p.prototypes, teacher_dtype, threads, level);
  else if (student_dtype == "bfloat16")
    with_teacher<bfloat16>(op, p, p.rows, p.prototypes, teacher_dtype, threads, level);
  else
    throw py::value_error(std::string(op) + ": expected float32 or bfloat16, got " + student_dtype);
}

void check_params(const char* op, const Params& p, int threads) {
  require(p.rows >= 0, op, "rows must not be negative, got " + std::to_string(p.rows));
  require(p.prototypes >= 0, op,
          "prototypes must not be negative, got " + std::to_string(p.prototypes));
  require(p.num_teachers == 1 || p.num_teachers == 2, op,
          "num_teachers must be 1 or 2, got " + std::to_string(p.num_teachers));
  require(threads >= 1, op, "threads must be at least 1, got " + std::to_string(threads));
  require_matrix(op, "student", p.student, p.rows, p.prototypes, p.student_row_stride, false);
  require_matrix(op, "teacher", p.teacher, p.num_teacher_rows, p.prototypes, p.teacher_row_stride,
                 false);
  require_within(op, "teacher_rows", p.teacher_rows, p.rows * p.num_teachers, -1,
                 p.num_teacher_rows);
}

// Arguments that all three functions take, by name: they are too many to keep in order.
void fill(Params& p, const py::kwargs& a) {
  p.student = pointer<const void>(a, "student");
  p.teacher = pointer<const void>(a, "teacher");
  p.log_u = pointer<const float>(a, "log_u");
  p.log_v = pointer<const float>(a, "log_v");
  p.teacher_rows = pointer<const int64_t>(a, "teacher_rows");
  p.rows = a["rows"].cast<int64_t>();
  p.prototypes = a["prototypes"].cast<int64_t>();
  p.num_teacher_rows = a["num_teacher_rows"].cast<int64_t>();
  p.num_teachers = a["num_teachers"].cast<int64_t>();
  p.student_row_stride = a["student_row_stride"].cast<int64_t>();
  p.teacher_row_stride = a["teacher_row_stride"].cast<int64_t>();
  p.student_scale = static_cast<float>(1.0 / a["student_temperature"].cast<double>());
  p.teacher_scale = static_cast<float>(1.0 / a["teacher_temperature"].cast<double>());
}

// Reads how to run, checks, lets go of the GIL and runs.
template <typename P> void start(const char* op, const P& p, const py::kwargs& a) {
  const std::string student = a["dtype"].cast<std::string>();
  const std::string teacher = a["teacher_dtype"].cast<std::string>();
  const int threads = a["threads"].cast<int>();
  const Level level = choose_level(op, a["level"].cast<std::string>());
  check_params(op, p, threads);
  const py::gil_scoped_release released;
  launch(op, p, student, teacher, threads, level);
}

void cross_entropy_forward(const py::kwargs& a) {
  Forward p{};
  fill(p, a);
  p.loss = pointer<float>(a, "loss");
  p.normalizer = pointer<double>(a, "normalizer");
  p.target_sum = pointer<float>(a, "target_sum");
  start("cross_entropy_forward_cpu", p, a);
}

void cross_entropy_backward(const py::kwargs& a) {
  constexpr const char* op = "cross_entropy_backward_cpu";
  Backward p{};
  fill(p, a);
  p.grad_loss = pointer<const float>(a, "grad_loss");
  p.normalizer = pointer<const double>(a, "normalizer");
  p.target_sum = pointer<const float>(a, "target_sum");
  p.grad = pointer<void>(a, "grad");
  p.grad_row_stride = a["grad_row_stride"].cast<int64_t>();
  require_matrix(op, "grad", p.grad, p.rows, p.prototypes, p.grad_row_stride, true);
  start(op, p, a);
}

void cross_entropy_in_place(const py::kwargs& a) {
  constexpr const char* op = "cross_entropy_in_place_cpu";
  InPlace p{};
  fill(p, a);
  p.logits = pointer<float>(a, "student");
  p.row_weights = pointer<const float>(a, "row_weights");
  p.loss = pointer<float>(a, "loss");
  p.scratch = pointer<float>(a, "scratch");
  p.slots = a["slots"].cast<int64_t>();
  const std::string teacher = a["teacher_dtype"].cast<std::string>();
  const int threads = a["threads"].cast<int>();
  const Level level = choose_level(op, a["level"].cast<std::string>());
  check_params(op, p, threads);
  require(p.slots >= 1, op, "slots must be at least 1, got " + std::to_string(p.slots));
  require_matrix(op, "student", p.logits, p.rows, p.prototypes, p.student_row_stride, true);
  const int64_t width = (p.rows + p.slots - 1) / p.slots * p.prototypes;
  const py::gil_scoped_release released;
  with_teacher<float>(op, p, p.slots, width, teacher, threads, level);
}

} // namespace
} // namespace dinov2_fast

void bind_cross_entropy_cpu(py::module_& m) {
  using namespace dinov2_fast;
  m.def("cross_entropy_forward_cpu", &cross_entropy_forward,
        "student [S, K], teacher [R, K], log_u [K], log_v [R], teacher_rows [S, P] -> loss, "
        "normalizer "
        "and target_sum [S]; keywords: pointers, sizes, row strides in elements.");
  m.def("cross_entropy_backward_cpu", &cross_entropy_backward,
        "As forward, with grad_loss, normalizer and target_sum [S] -> grad [S, K].");
  m.def("cross_entropy_in_place_cpu", &cross_entropy_in_place,
        "As forward, with row_weights [S], scratch [slots, K] -> loss [S]; student, float32, "
        "becomes the gradient of sum(row_weights * loss).");
}
