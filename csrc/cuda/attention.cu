// Attention inside each sequence of a pack on CUDA: bfloat16 and float16, heads of 64 elements.
#include "check.hpp"
#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"
#include "cuda/attention_resident_backward.cuh"
#include "cuda/attention_resident_forward.cuh"
#include "cuda/device/guard.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/limits.cuh"
#include "cuda/device/types.cuh"
#include "keywords.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <string>
#include <vector>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

constexpr int64_t kMaxLength = kMaxInt - 1024; // of a sequence; blocks and tiles round it up
constexpr int kLongWarps = 4, kShortWarps = 2; // of a CTA; a tile of columns is as long as two

// Neighbouring sequences that one launch computes.
struct Run {
  int first;
  int num_sequences;
  int max_queries; // of the longest
  int max_keys;
  bool in_any_order; // whether dQ may be summed so, and its bits change from run to run

  // Whether one CTA makes all gradients of a sequence and head.
  bool one_cta() const { return std::max(max_queries, max_keys) <= Layout<kLeftWarps>::kRows; }
};

std::vector<Run> runs_of(const char* op, const std::vector<int64_t>& numbers, int num_heads) {
  constexpr size_t kNumbers = 5;
  require(numbers.size() % kNumbers == 0, op,
          "launches must be five numbers each, got " + std::to_string(numbers.size()));
  std::vector<Run> runs;
  for (size_t i = 0; i < numbers.size(); i += kNumbers) {
    for (size_t j = i; j < i + kNumbers; ++j)
      require(numbers[j] >= 0 && numbers[j] <= kMaxInt, op,
              "launches must be counts below 2^31, got " + std::to_string(numbers[j]));
    const Run run{static_cast<int>(numbers[i]), static_cast<int>(numbers[i + 1]),
                  static_cast<int>(numbers[i + 2]), static_cast<int>(numbers[i + 3]),
                  numbers[i + 4] != 0};
    const int64_t longest = std::max(run.max_queries, run.max_keys);
    require_at_most(op, "launches: the longest sequence", longest, kMaxLength);
    require_at_most(op, "launches: sequences up to the last of one", numbers[i] + numbers[i + 1],
                    kMaxInt);
    const int64_t blocks = (longest / (kShortWarps * kWarpRows) + 1) * run.num_sequences;
    if (num_heads > 0)
      require_at_most(op, "launches: blocks of a head in one", blocks, kMaxInt / num_heads);
    runs.push_back(run);
  }
  return runs;
}

// One CTA for each block of rows of a sequence and head, or so many at most, which then compute one
// after another.
template <auto kernel, int kWarps>
cudaError_t launch_blocks(Params p, const Run& run, int max_rows, int shared_bytes,
                          cudaStream_t stream, int64_t max_ctas = kMaxInt) {
  constexpr int kRows = kWarps * kWarpRows;
  p.first_sequence = run.first;
  p.num_blocks = (max_rows + kRows - 1) / kRows;
  const int64_t blocks = static_cast<int64_t>(run.num_sequences) * p.num_blocks * p.num_heads;
  if (blocks == 0)
    return cudaSuccess; // a grid of no blocks is an error to CUDA
  p.num_problems = static_cast<unsigned>(blocks);
  return launch<kernel>(dim3(static_cast<unsigned>(std::min(blocks, max_ctas))),
                        dim3(kWarps * kWarp), shared_bytes, stream, p);
}

template <typename T>
cudaError_t launch_forward(const Params& p, const Run& run, cudaStream_t stream) {
  const bool one_tile = run.max_keys <= kColumns;
  if (run.max_queries <= kShortWarps * kWarpRows)
    return launch_blocks<attention_forward_kernel<T, kShortWarps>, kShortWarps>(
        p, run, run.max_queries, forward_shared_bytes<kShortWarps>(one_tile), stream);
  // Two CTAs would read all keys and values twice.
  constexpr int kRows = kSequenceRows;
  if (run.max_queries > kLongWarps * kWarpRows && run.max_queries <= kRows && run.max_keys <= kRows)
    return launch_blocks<attention_forward_resident_kernel<T>, kForwardWarps>(
        p, run, 1, kForwardResidentBytes, stream);
  return launch_blocks<attention_forward_kernel<T, kLongWarps>, kLongWarps>(
      p, run, run.max_queries, forward_shared_bytes<kLongWarps>(one_tile), stream);
}

// One kernel for queries and one for keys: the same bits in every run.
template <typename T>
cudaError_t launch_both(const Params& p, const Run& run, cudaStream_t stream) {
  const cudaError_t status =
      launch_blocks<attention_backward_queries_kernel<T, kLongWarps>, kLongWarps>(
          p, run, run.max_queries, queries_shared_bytes<kLongWarps>(run.max_keys <= kColumns),
          stream);
  if (status != cudaSuccess)
    return status;
  return launch_blocks<attention_backward_keys_kernel<T, kLongWarps>, kLongWarps>(
      p, run, run.max_keys, keys_shared_bytes<kLongWarps>(run.max_queries <= kColumns), stream);
}

// Each sequence and head, if any has a row, by one CTA; where one fills an SM, there are no more of
// them than SMs.
template <typename T, int kWarps>
cudaError_t launch_backward_resident(const Params& p, const Run& run, int longest,
                                     cudaStream_t stream) {
  int max_ctas = kMaxInt;
  if (kHasLeft<kWarps>) {
    const cudaError_t status = count_multiprocessors(max_ctas);
    if (status != cudaSuccess)
      return status;
  }
  return launch_blocks<attention_backward_resident_kernel<T, kWarps, false>, kWarps>(
      p, run, std::min(longest, 1), Layout<kWarps>::kBytes, stream, max_ctas);
}

// One CTA for each block of keys, and then dQ out of what they have added up.
template <typename T>
cudaError_t launch_parts(const Params& p, const Run& run, cudaStream_t stream) {
  const cudaError_t status =
      launch_blocks<attention_backward_resident_kernel<T, kLeftWarps, true>, kLeftWarps>(
          p, run, run.max_keys, Layout<kLeftWarps>::kBytes, stream);
  if (status != cudaSuccess)
    return status;
  return launch_blocks<attention_backward_round_queries_kernel<T, kLongWarps>, kLongWarps>(
      p, run, run.max_queries, 0, stream);
}

template <typename T>
cudaError_t launch_backward(const Params& p, const Run& run, cudaStream_t stream) {
  const int longest = std::max(run.max_queries, run.max_keys);
  if (longest <= Layout<kShortWarps>::kRows)
    return launch_backward_resident<T, kShortWarps>(p, run, longest, stream);
  if (run.one_cta())
    return launch_backward_resident<T, kLeftWarps>(p, run, longest, stream);
  return run.in_any_order ? launch_parts<T>(p, run, stream) : launch_both<T>(p, run, stream);
}

// What both directions take.
struct Call {
  Params params{};
  std::vector<Run> runs;
  bool has_queries, has_keys; // else their tensors may be null pointers
  std::string dtype;
  int device;
  cudaStream_t stream;
};

// A [T, H, 64] argument: its pointer and strides in elements.
Heads heads_of(const char* op, const py::kwargs& a, const std::string& name, bool needed) {
  const Heads heads{pointer<void>(a, name.c_str()),
                    keyword<int64_t>(a, (name + "_row_stride").c_str()),
                    keyword<int64_t>(a, (name + "_head_stride").c_str())};
  constexpr int kVector = kChunkBytes / 2;
  if (needed)
    require_pointer(op, name.c_str(), heads.data);
  require(whole_vectors<__half, kVector>(heads.data, heads.row_stride) &&
              heads.head_stride % kVector == 0,
          op, name + " must have its heads at multiples of 16 bytes");
  return heads;
}

Call call_of(const char* op, const py::kwargs& a) {
  Call call;
  Params& p = call.params;
  p.num_queries = keyword<int64_t>(a, "num_queries");
  const auto num_heads = keyword<int64_t>(a, "num_heads");
  require_not_negative(op, "num_queries", p.num_queries);
  require_not_negative(op, "num_heads", num_heads);
  require_at_most(op, "num_heads", num_heads, kMaxInt);
  p.num_heads = static_cast<int>(num_heads);
  call.runs = runs_of(op, keyword<std::vector<int64_t>>(a, "launches"), p.num_heads);
  const auto any = [&](int Run::* rows) {
    return std::any_of(call.runs.begin(), call.runs.end(), [&](const Run& run) {
      return run.*rows > 0 && run.num_sequences > 0 && p.num_heads > 0;
    });
  };
  call.has_queries = any(&Run::max_queries);
  call.has_keys = any(&Run::max_keys);
  p.q = heads_of(op, a, "q", call.has_queries);
  p.k = heads_of(op, a, "k", call.has_keys);
  p.v = heads_of(op, a, "v", call.has_keys);
  p.out = heads_of(op, a, "out", call.has_queries);
  p.lse = pointer<float>(a, "lse");
  p.query_offsets = pointer<const int>(a, "query_offsets");
  p.key_offsets = pointer<const int>(a, "key_offsets");
  if (call.has_queries)
    require_pointer(op, "lse", p.lse);
  require_pointer(op, "query_offsets", p.query_offsets);
  require_pointer(op, "key_offsets", p.key_offsets);
  p.scale = keyword<float>(a, "scale");
  // A masked score is -inf, and -inf * 0 would be NaN: this scale leaves 0 of any finite score.
  p.scale_log2 = p.scale == 0.0f ? FLT_MIN : p.scale * kLog2E;
  call.dtype = keyword<std::string>(a, "dtype");
  call.device = keyword<int>(a, "device");
  call.stream = pointer<CUstream_st>(a, "stream");
  return call;
}

// body(Type<T>, run) for each launch of a call.
template <typename Body> void for_each_run(const char* op, const Call& call, const Body& body) {
  const py::gil_scoped_release release;
  run_on(op, call.device, [&] {
    return with_half_type(op, call.dtype, [&](auto type) {
      for (const Run& run : call.runs) {
        const cudaError_t status = body(type, run);
        if (status != cudaSuccess)
          return status;
      }
      return cudaSuccess;
    });
  });
}

void attention_forward(const py::kwargs& a) {
  constexpr const char* op = "attention_forward_cuda";
  const Call call = call_of(op, a);
  for_each_run(op, call, [&](auto type, const Run& run) {
    return launch_forward<typename decltype(type)::type>(call.params, run, call.stream);
  });
}

void attention_backward(const py::kwargs& a) {
  constexpr const char* op = "attention_backward_cuda";
  Call call = call_of(op, a);
  Params& p = call.params;
  p.d_out = heads_of(op, a, "d_out", call.has_queries);
  p.d_q = heads_of(op, a, "d_q", call.has_queries);
  p.d_k = heads_of(op, a, "d_k", call.has_keys);
  p.d_v = heads_of(op, a, "d_v", call.has_keys);
  p.delta = pointer<float>(a, "delta");
  p.d_q_sums = pointer<float>(a, "d_q_sums");
  for (const Run& run : call.runs)
    if (call.has_queries && !run.one_cta())
      require_pointer(op, run.in_any_order ? "d_q_sums" : "delta",
                      run.in_any_order ? p.d_q_sums : p.delta);
  for_each_run(op, call, [&](auto type, const Run& run) {
    return launch_backward<typename decltype(type)::type>(p, run, call.stream);
  });
}

} // namespace
} // namespace dinov2_fast

void bind_attention_cuda(py::module_& m) {
  using namespace dinov2_fast;
  m.def("attention_forward_cuda", &attention_forward,
        "q [Tq, H, 64], k and v [T, H, 64], offsets [S + 1] int32, launches of (first, sequences, "
        "longest queries, longest keys, whether the backward may sum in any order) -> out "
        "[Tq, H, 64], lse [H, Tq] float32; pointers, sizes and strides in elements, rows at "
        "multiples of 16 bytes.");
  m.def("attention_backward_cuda", &attention_backward,
        "d_out, out [Tq, H, 64], q, k, v, lse as of the forward -> d_q, d_k, d_v. Scratch, or null "
        "where no launch has more than 264 queries or keys and needs it: d_q_sums [Tq, H, 64] "
        "float32, zeros, for sums in any order; delta [H, Tq] float32 for those in one order.");
}
