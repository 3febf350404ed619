// The optimizer on the CPU, over whole lists of tensors: AdamW with the teacher's moving average
// and the bfloat16 copies of both in one pass over memory, and the gradient norm. Tensors are cut
// into chunks of a fixed size, so that threads share them evenly and no sum depends on how many
// threads there are.
#include "adamw.hpp"
#include "cpu/rows.hpp"
#include "keywords.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

using Pointers = std::vector<uintptr_t>;

constexpr int64_t kChunk = 16384; // elements; five arrays of them fit a core's L2 cache

struct Chunk {
  int64_t tensor;
  int64_t begin, end; // elements of the tensor
};

struct Step {
  const uintptr_t *parameters, *gradients, *exp_avgs, *exp_avg_sqs;
  const uintptr_t* ema_parameters; // null without a teacher
  const uintptr_t* copies;         // null without copies; of a tensor that has none, 0
  const uintptr_t* ema_copies;     // those of the teacher
  AdamW numbers;
};

struct StepKernel {
  template <bool with_ema, bool with_copy>
  [[gnu::always_inline]] static inline void chunk(const Step& s, int64_t tensor, int64_t begin,
                                                  int64_t end) {
    float* __restrict parameter = reinterpret_cast<float*>(s.parameters[tensor]);
    const float* __restrict gradient = reinterpret_cast<const float*>(s.gradients[tensor]);
    float* __restrict exp_avg = reinterpret_cast<float*>(s.exp_avgs[tensor]);
    float* __restrict exp_avg_sq = reinterpret_cast<float*>(s.exp_avg_sqs[tensor]);
    float* __restrict teacher =
        with_ema ? reinterpret_cast<float*>(s.ema_parameters[tensor]) : nullptr;
    bfloat16* __restrict copy = with_copy ? reinterpret_cast<bfloat16*>(s.copies[tensor]) : nullptr;
    bfloat16* __restrict teacher_copy =
        with_copy && with_ema ? reinterpret_cast<bfloat16*>(s.ema_copies[tensor]) : nullptr;
    const AdamW local = s.numbers; // stores to floats cannot change it: it stays in registers
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const float g = gradient[i] * local.gradient_scale;
      const float m = local.first_moment(exp_avg[i], g);
      const float v = exp_avg_sq[i] * local.beta2 + local.one_minus_beta2 * (g * g);
      const float denominator = std::sqrt(v) / local.root_correction + local.eps;
      const float p = parameter[i] * local.decay + local.rate * (m / denominator);
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
      parameter[i] = p;
      if constexpr (with_copy)
        store(copy[i], p);
      if constexpr (with_ema) {
        const float average = local.ema(teacher[i], p);
        teacher[i] = average;
        if constexpr (with_copy)
          store(teacher_copy[i], average);
      }
    }
  }

  template <bool with_ema>
  [[gnu::always_inline]] static inline void with_or_without_copy(const Step& s, int64_t tensor,
                                                                 int64_t begin, int64_t end) {
    if (s.copies == nullptr || s.copies[tensor] == 0)
      chunk<with_ema, false>(s, tensor, begin, end);
    else
      chunk<with_ema, true>(s, tensor, begin, end);
  }

  [[gnu::always_inline]] static inline void run(const Step& s, int64_t tensor, int64_t begin,
                                                int64_t end) {
    if (s.ema_parameters == nullptr)
      with_or_without_copy<false>(s, tensor, begin, end);
    else
      with_or_without_copy<true>(s, tensor, begin, end);
  }
};

struct SquaredNorm {
  const uintptr_t* tensors;
  double* sum; // of the squares of the chunk
};

[[gnu::always_inline]] inline double square(double x) { return x * x; }

struct SquaredNormKernel {
  [[gnu::always_inline]] static inline void run(const SquaredNorm& s, int64_t tensor, int64_t begin,
                                                int64_t end) {
    const float* __restrict x = reinterpret_cast<const float*>(s.tensors[tensor]);
    // Four sums that do not wait for one another.
    const int64_t quarter = (end - begin) / 4;
    const float* __restrict x0 = x + begin;
    const float* __restrict x1 = x0 + quarter;
    const float* __restrict x2 = x1 + quarter;
    const float* __restrict x3 = x2 + quarter;
    double sum0 = 0.0, sum1 = 0.0, sum2 = 0.0, sum3 = 0.0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
    for (int64_t i = 0; i < quarter; ++i) {
      sum0 += square(x0[i]);
      sum1 += square(x1[i]);
      sum2 += square(x2[i]);
      sum3 += square(x3[i]);
    }
    for (int64_t i = begin + 4 * quarter; i < end; ++i)
      sum0 += square(x[i]);
    *s.sum = (sum0 + sum1) + (sum2 + sum3);
  }
};

std::vector<Chunk> chunks_of(const std::vector<int64_t>& sizes) {
  std::vector<Chunk> chunks;
  for (size_t tensor = 0; tensor < sizes.size(); ++tensor)
    for (int64_t begin = 0; begin < sizes[tensor]; begin += kChunk)
      chunks.push_back(
          {static_cast<int64_t>(tensor), begin, std::min(begin + kChunk, sizes[tensor])});
  return chunks;
}

// Calls body(number of the chunk, chunk) for all of them.
template <typename Body>
void parallel_chunks(const std::vector<Chunk>& chunks, int threads, const Body& body) {
  int64_t elements = 0;
  for (const Chunk& chunk : chunks)
    elements += chunk.end - chunk.begin;
  const int64_t count = static_cast<int64_t>(chunks.size());
  const int64_t width = count == 0 ? 0 : elements / count;
  parallel_rows(count, width, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      body(i, chunks[static_cast<size_t>(i)]);
  });
}

void require_sizes(const char* op, const std::vector<int64_t>& sizes, int threads) {
  for (int64_t size : sizes)
    require(size >= 0, op, "sizes must not be negative, got " + std::to_string(size));
  require(threads >= 1, op, "threads must be at least 1, got " + std::to_string(threads));
}

void require_pointers(const char* op, const char* name, const Pointers& pointers,
                      const std::vector<int64_t>& sizes) {
  require(pointers.size() == sizes.size(), op,
          std::string(name) + " must hold " + std::to_string(sizes.size()) + " pointers, got " +
              std::to_string(pointers.size()));
  for (size_t i = 0; i < sizes.size(); ++i)
    require_vector(op, name, reinterpret_cast<const void*>(pointers[i]), sizes[i]);
}

// Copies come with every tensor of the list or with none; a tensor may have 0 for its own.
void require_copies(const char* op, const char* name, const Pointers& copies,
                    const std::vector<int64_t>& sizes) {
  require(copies.empty() || copies.size() == sizes.size(), op,
          std::string(name) + " must hold 0 or " + std::to_string(sizes.size()) +
              " pointers, got " + std::to_string(copies.size()));
}

void optimizer_step(const py::kwargs& a) {
  constexpr const char* op = "optimizer_step_cpu";
  const auto sizes = keyword<std::vector<int64_t>>(a, "sizes");
  const int threads = keyword<int>(a, "threads");
  const auto parameters = keyword<Pointers>(a, "parameters");
  const auto gradients = keyword<Pointers>(a, "gradients");
  const auto exp_avgs = keyword<Pointers>(a, "exp_avgs");
  const auto exp_avg_sqs = keyword<Pointers>(a, "exp_avg_sqs");
  const auto ema_parameters = keyword<Pointers>(a, "ema_parameters");
  const auto copies = keyword<Pointers>(a, "copies");
  const auto ema_copies = keyword<Pointers>(a, "ema_copies");
  const bool with_ema = keyword<bool>(a, "with_ema");
  require_sizes(op, sizes, threads);
  require_pointers(op, "parameters", parameters, sizes);
  require_pointers(op, "gradients", gradients, sizes);
  require_pointers(op, "exp_avgs", exp_avgs, sizes);
  require_pointers(op, "exp_avg_sqs", exp_avg_sqs, sizes);
  if (with_ema)
    require_pointers(op, "ema_parameters", ema_parameters, sizes);
  require_copies(op, "copies", copies, sizes);
  require_copies(op, "ema_copies", ema_copies, sizes);
  for (size_t i = 0; with_ema && i < copies.size(); ++i)
    require(!ema_copies.empty() && (copies[i] == 0) == (ema_copies[i] == 0), op,
            "ema_copies must hold a pointer where copies do");
  const Step s{parameters.data(),
               gradients.data(),
               exp_avgs.data(),
               exp_avg_sqs.data(),
               with_ema ? ema_parameters.data() : nullptr,
               copies.empty() ? nullptr : copies.data(),
               ema_copies.data(),
               adamw_of(op, a)};
  auto* run = at_level<StepKernel, Step>(choose_level(op, keyword<std::string>(a, "level")));
  const py::gil_scoped_release release;
  parallel_chunks(chunks_of(sizes), threads, [&](int64_t, const Chunk& chunk) {
    run(s, chunk.tensor, chunk.begin, chunk.end);
  });
}

double optimizer_norm(const Pointers& tensors, const std::vector<int64_t>& sizes, int threads,
                      const std::string& level) {
  constexpr const char* op = "optimizer_norm_cpu";
  require_sizes(op, sizes, threads);
  require_pointers(op, "tensors", tensors, sizes);
  auto* run = at_level<SquaredNormKernel, SquaredNorm>(choose_level(op, level));
  const std::vector<Chunk> chunks = chunks_of(sizes);
  std::vector<double> sums(chunks.size());
  parallel_chunks(chunks, threads, [&](int64_t i, const Chunk& chunk) {
    run({tensors.data(), &sums[static_cast<size_t>(i)]}, chunk.tensor, chunk.begin, chunk.end);
  });
  double total = 0.0;
  for (double sum : sums)
    total += sum;
  // As the reference, which sums in float32: the trainer skips a step whose squares overflow it.
  if (total > std::numeric_limits<float>::max())
    return std::numeric_limits<double>::infinity();
  return std::sqrt(total);
}

} // namespace
} // namespace dinov2_fast

void bind_optimizer_cpu(py::module_& m) {
  using namespace dinov2_fast;
  m.def("optimizer_step_cpu", &optimizer_step,
        "AdamW, the teacher's moving average and bfloat16 copies of both, in place. Lists of "
        "pointers "
        "to adjacent float32 (parameters, gradients, exp_avgs, exp_avg_sqs, ema_parameters) and "
        "bfloat16 (copies, ema_copies: empty, or 0 for a tensor without); with_ema, sizes, lr, "
        "weight_decay, beta1, beta2, eps, step, momentum, gradient_scale, threads, level.");
  m.def("optimizer_norm_cpu", &optimizer_norm,
        "Euclidean norm of all tensors as one vector; a list of pointers to adjacent float32.",
        py::arg("tensors"), py::arg("sizes"), py::arg("threads"), py::arg("level"),
        py::call_guard<py::gil_scoped_release>());
}
