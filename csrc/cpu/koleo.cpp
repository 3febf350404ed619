// KoLeo on the CPU: rows scaled to length 1, the nearest other row of each, and the gradient of the
// distances' logarithms. Every row is one task and its sums have a fixed order, so no bit depends
// on the number of threads.
#include "cpu/rows.hpp"
#include "keywords.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

constexpr int64_t kQueries = 4, kKeys = 2; // 8 sums of a vector each, and 6 vectors read for them

struct Params {
  const float* x;         // [B, C]
  int64_t x_row_stride;   // elements
  float* normalised;      // [B, C]
  float* norms;           // [B], the lengths that rows were divided by, at least eps
  int64_t* nearest;       // [B]
  float* losses;          // [B], -log(distance + eps)
  float* pulls;           // [B], 1 / ((distance + eps) distance); 0 between equal rows
  const float* gradients; // [B], of the losses
  float* dx;              // [B, C]
  int64_t rows, channels;
  float eps;
};

struct NormaliseKernel {
  [[gnu::always_inline]] static inline void run(const Params& p, int64_t, int64_t begin,
                                                int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* __restrict x = p.x + i * p.x_row_stride;
      float* __restrict to = p.normalised + i * p.channels;
      double squares = 0.0;
#pragma omp simd reduction(+ : squares)
      for (int64_t c = 0; c < p.channels; ++c)
        squares += static_cast<double>(x[c]) * x[c];
      const auto length = static_cast<float>(std::sqrt(squares));
      const float norm = length < p.eps ? p.eps : length; // keeps NaN
      p.norms[i] = norm;
#pragma omp simd
      for (int64_t c = 0; c < p.channels; ++c)
        to[c] = x[c] / norm;
    }
  }
};

// The nearest other row of some queries; they are few, so that their rows stay in the L1 cache.
struct NearestKernel {
  // Products of queries with keys; addresses may repeat where there are fewer.
  [[gnu::always_inline]] static inline void products(const float* const (&q)[kQueries],
                                                     const float* const (&k)[kKeys],
                                                     int64_t channels,
                                                     float (&dots)[kQueries][kKeys]) {
    const float *q0 = q[0], *q1 = q[1], *q2 = q[2], *q3 = q[3], *k0 = k[0], *k1 = k[1];
    float s00 = 0, s01 = 0, s10 = 0, s11 = 0, s20 = 0, s21 = 0, s30 = 0, s31 = 0;
#pragma omp simd reduction(+ : s00, s01, s10, s11, s20, s21, s30, s31)
    for (int64_t c = 0; c < channels; ++c) {
      s00 += q0[c] * k0[c];
      s01 += q0[c] * k1[c];
      s10 += q1[c] * k0[c];
      s11 += q1[c] * k1[c];
      s20 += q2[c] * k0[c];
      s21 += q2[c] * k1[c];
      s30 += q3[c] * k0[c];
      s31 += q3[c] * k1[c];
    }
    const float sums[kQueries][kKeys] = {{s00, s01}, {s10, s11}, {s20, s21}, {s30, s31}};
    std::copy(&sums[0][0], &sums[0][0] + kQueries * kKeys, &dots[0][0]);
  }

  [[gnu::always_inline]] static inline void run(const Params& p, int64_t, int64_t begin,
                                                int64_t end) {
    const float* q[kQueries];
    float best[kQueries];
    for (int64_t i = 0; i < kQueries; ++i) {
      q[i] = p.normalised + std::min(begin + i, end - 1) * p.channels;
      best[i] = -std::numeric_limits<float>::infinity();
    }
    for (int64_t i = begin; i < end; ++i)
      p.nearest[i] = i == 0 ? 1 : 0; // stays where every product is NaN
    for (int64_t j = 0; j < p.rows; j += kKeys) {
      const float* k[kKeys];
      for (int64_t n = 0; n < kKeys; ++n)
        k[n] = p.normalised + std::min(j + n, p.rows - 1) * p.channels;
      float dots[kQueries][kKeys];
      products(q, k, p.channels, dots);
      for (int64_t i = 0; i < end - begin; ++i)
        for (int64_t n = 0; n < kKeys && j + n < p.rows; ++n)
          if (j + n != begin + i && dots[i][n] > best[i]) { // the lowest number wins a tie
            best[i] = dots[i][n];
            p.nearest[begin + i] = j + n;
          }
    }
    for (int64_t i = begin; i < end; ++i)
      distance(p, i);
  }

  [[gnu::always_inline]] static inline void distance(const Params& p, int64_t i) {
    const float* __restrict own = p.normalised + i * p.channels;
    const float* __restrict other = p.normalised + p.nearest[i] * p.channels;
    double squares = 0.0;
    int differing = 0;
#pragma omp simd reduction(+ : squares) reduction(| : differing)
    for (int64_t c = 0; c < p.channels; ++c) {
      const float apart = own[c] - other[c] + p.eps;
      squares += static_cast<double>(apart) * apart;
      differing |= own[c] == other[c] ? 0 : 1;
    }
    const double distance = std::sqrt(squares);
    p.losses[i] = static_cast<float>(-std::log(distance + p.eps));
    p.pulls[i] = differing == 0 ? 0.0f : static_cast<float>(1.0 / ((distance + p.eps) * distance));
  }
};

// Gradient of one row: its own pull, and those of the rows whose nearest it is, in their order.
struct GradientKernel {
  [[gnu::always_inline]] static inline void add(const Params& p, float* to, int64_t of,
                                                float sign) {
    const float factor = -sign * p.gradients[of] * p.pulls[of];
    if (factor == 0.0f)
      return; // between equal rows eps alone has a direction
    const float* __restrict own = p.normalised + of * p.channels;
    const float* __restrict other = p.normalised + p.nearest[of] * p.channels;
    float* __restrict sum = to;
#pragma omp simd
    for (int64_t c = 0; c < p.channels; ++c)
      sum[c] += factor * (own[c] - other[c] + p.eps);
  }

  [[gnu::always_inline]] static inline void run(const Params& p, int64_t, int64_t begin,
                                                int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* __restrict dx = p.dx + t * p.channels;
      const float* __restrict unit = p.normalised + t * p.channels;
      std::fill(dx, dx + p.channels, 0.0f);
      add(p, dx, t, 1.0f);
      for (int64_t i = 0; i < p.rows; ++i)
        if (p.nearest[i] == t)
          add(p, dx, i, -1.0f);
      const float norm = p.norms[t];
      double along = 0.0; // a row no longer than eps was divided by a constant
      if (norm > p.eps) {
#pragma omp simd reduction(+ : along)
        for (int64_t c = 0; c < p.channels; ++c)
          along += static_cast<double>(dx[c]) * unit[c];
      }
      const auto radial = static_cast<float>(along);
#pragma omp simd
      for (int64_t c = 0; c < p.channels; ++c)
        dx[c] = (dx[c] - radial * unit[c]) / norm;
    }
  }
};

Params params_of(const char* op, const py::kwargs& a) {
  Params p{};
  p.rows = keyword<int64_t>(a, "rows");
  p.channels = keyword<int64_t>(a, "channels");
  p.eps = keyword<float>(a, "eps");
  p.normalised = pointer<float>(a, "normalised");
  p.norms = pointer<float>(a, "norms");
  p.nearest = pointer<int64_t>(a, "nearest");
  p.pulls = pointer<float>(a, "pulls");
  require(p.rows >= 2, op, "rows must be at least 2, got " + std::to_string(p.rows));
  require_numbers(op, p.channels, keyword<int>(a, "threads"));
  require_vector(op, "normalised", p.normalised, p.rows * p.channels);
  require_vector(op, "norms", p.norms, p.rows);
  require_vector(op, "nearest", p.nearest, p.rows);
  require_vector(op, "pulls", p.pulls, p.rows);
  return p;
}

void koleo_forward(const py::kwargs& a) {
  constexpr const char* op = "koleo_forward_cpu";
  Params p = params_of(op, a);
  p.x = pointer<const float>(a, "x");
  p.x_row_stride = keyword<int64_t>(a, "x_row_stride");
  p.losses = pointer<float>(a, "losses");
  require_matrix(op, "x", p.x, p.rows, p.channels, p.x_row_stride, false);
  require_vector(op, "losses", p.losses, p.rows);
  const Level level = choose_level(op, keyword<std::string>(a, "level"));
  const int threads = keyword<int>(a, "threads");
  auto* normalise = at_level<NormaliseKernel, Params>(level);
  auto* search = at_level<NearestKernel, Params>(level);
  const py::gil_scoped_release release;
  parallel_blocks(p.rows, 1, p.channels, threads, [&](int64_t block, int64_t begin, int64_t end) {
    normalise(p, block, begin, end);
  });
  parallel_blocks(p.rows, kQueries, p.rows * p.channels, threads,
                  [&](int64_t block, int64_t begin, int64_t end) { search(p, block, begin, end); });
}

void koleo_backward(const py::kwargs& a) {
  constexpr const char* op = "koleo_backward_cpu";
  Params p = params_of(op, a);
  p.gradients = pointer<const float>(a, "gradients");
  p.dx = pointer<float>(a, "dx");
  require_vector(op, "gradients", p.gradients, p.rows);
  require_vector(op, "dx", p.dx, p.rows * p.channels);
  require_within(op, "nearest", p.nearest, p.rows, 0, p.rows);
  auto* run = at_level<GradientKernel, Params>(choose_level(op, keyword<std::string>(a, "level")));
  const int threads = keyword<int>(a, "threads");
  const py::gil_scoped_release release;
  parallel_blocks(p.rows, 1, 3 * p.channels + p.rows, threads,
                  [&](int64_t block, int64_t begin, int64_t end) { run(p, block, begin, end); });
}

} // namespace
} // namespace dinov2_fast

void bind_koleo_cpu(py::module_& m) {
  using namespace dinov2_fast;
  m.def("koleo_forward_cpu", &koleo_forward,
        "x [B, C] float32 -> losses, norms, pulls [B], nearest [B] int64, normalised [B, C]; "
        "x_row_stride, rows, channels, eps, threads, level.");
  m.def(
      "koleo_backward_cpu", &koleo_backward,
      "gradients [B] of the losses and what the forward gave -> dx [B, C] float32; rows, channels, "
      "eps, threads, level.");
}
