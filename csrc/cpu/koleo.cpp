// KoLeo on the CPU: rows scaled to length 1, the nearest other row of each, and the gradient of the
// distances' logarithms. Sums have an order that no number of threads changes; that of a pair's
// product depends on neither row, so that equal rows tie in every bit.
#include "cpu/float_products.hpp"
#include "cpu/rows.hpp"
#include "keywords.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

constexpr int64_t kMostColumns = 64; // of a panel, on the widest instruction set

struct Params {
  const float* x;       // [B, C]
  int64_t x_row_stride; // elements
  float* normalised;    // [B, C]
  float* panels;        // [panels, C, columns], unit rows across; zeros beyond B
  float* norms;         // [B], the lengths that rows were divided by, at least eps
  int64_t* nearest;     // [B]
  float* losses;        // [B], -log(distance + eps)
  float* loss;          // their mean
  float* pulls;         // [B], 1 / ((distance + eps) distance); 0 between equal rows
  float* dx;            // [B, C]
  int64_t rows, channels;
  float eps;
  float gradient; // of each loss
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

// Rows of a panel side by side, as operands of products that keep a tile of sums in registers.
template <typename Isa> struct Panels {
  static constexpr int64_t kColumns = Isa::kLanes * Isa::kVectors;
  static_assert(kColumns <= kMostColumns, "scratch holds whole panels of the widest set");

  static float* of(const Params& p, int64_t panel) {
    return p.panels + panel * p.channels * kColumns;
  }
};

template <typename Isa> struct AcrossKernel {
  static constexpr int64_t kColumns = Panels<Isa>::kColumns;

  [[gnu::always_inline]] static inline void run(const Params& p, int64_t panel, int64_t begin,
                                                int64_t end) {
    float* to = Panels<Isa>::of(p, panel);
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t column = 0; column < kColumns; ++column) {
        const int64_t row = begin + column;
        to[c * kColumns + column] = row < end ? p.normalised[row * p.channels + c] : 0.0f;
      }
  }
};

// The nearest other row of each row of a panel.
template <typename Isa> struct NearestKernel {
  static constexpr int64_t kColumns = Panels<Isa>::kColumns;

  [[gnu::always_inline]] static inline void run(const Params& p, int64_t panel, int64_t begin,
                                                int64_t end) {
    alignas(64) float products[kColumns * kColumns];
    float best[kColumns];
    for (int64_t i = begin; i < end; ++i) {
      best[i - begin] = -std::numeric_limits<float>::infinity();
      p.nearest[i] = i == 0 ? 1 : 0; // stays where every product is NaN
    }
    const float* queries = Panels<Isa>::of(p, panel);
    for (int64_t first = 0; first < p.rows; first += kColumns) {
      const float* keys = Panels<Isa>::of(p, first / kColumns);
      multiply<Isa>({queries, 1, kColumns}, {keys, 0, kColumns}, products, kColumns, kColumns,
                    kColumns, p.channels, false);
      const int64_t count = std::min(kColumns, p.rows - first);
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < count; ++j) {
          const float product = products[(i - begin) * kColumns + j];
          if (product > best[i - begin] && first + j != i) { // the lowest number wins a tie
            best[i - begin] = product;
            p.nearest[i] = first + j;
          }
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
    const float factor = -sign * p.gradient * p.pulls[of];
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

// Unit rows, the nearest of each, and the mean of their losses.
template <typename Isa> void forward_with(const Params& p, int threads, Level level) {
  constexpr int64_t kColumns = Panels<Isa>::kColumns;
  auto* normalise = at_level<NormaliseKernel, Params>(level);
  auto* across = at_level<AcrossKernel<Isa>, Params>(level);
  auto* search = at_level<NearestKernel<Isa>, Params>(level);
  parallel_blocks(p.rows, kColumns, p.channels, threads,
                  [&](int64_t panel, int64_t begin, int64_t end) {
                    normalise(p, panel, begin, end);
                    across(p, panel, begin, end);
                  });
  parallel_blocks(p.rows, kColumns, p.rows * p.channels, threads,
                  [&](int64_t panel, int64_t begin, int64_t end) { search(p, panel, begin, end); });
  double sum = 0.0;
  for (int64_t i = 0; i < p.rows; ++i)
    sum += static_cast<double>(p.losses[i]);
  *p.loss = static_cast<float>(sum / static_cast<double>(p.rows));
}

void koleo_forward(const py::kwargs& a) {
  constexpr const char* op = "koleo_forward_cpu";
  Params p = params_of(op, a);
  p.x = pointer<const float>(a, "x");
  p.x_row_stride = keyword<int64_t>(a, "x_row_stride");
  p.losses = pointer<float>(a, "losses");
  p.loss = pointer<float>(a, "loss");
  p.panels = pointer<float>(a, "panels");
  require_matrix(op, "x", p.x, p.rows, p.channels, p.x_row_stride, false);
  require_vector(op, "losses", p.losses, p.rows);
  require_pointer(op, "loss", p.loss);
  require_pointer(op, "panels", p.panels);
  const Level level = choose_level(op, keyword<std::string>(a, "level"));
  const int threads = keyword<int>(a, "threads");
  const py::gil_scoped_release release;
  if (level >= Level::avx512)
    forward_with<Avx512>(p, threads, level);
  else if (level == Level::avx2)
    forward_with<Avx2>(p, threads, level);
  else
    forward_with<Baseline>(p, threads, level);
}

void koleo_backward(const py::kwargs& a) {
  constexpr const char* op = "koleo_backward_cpu";
  Params p = params_of(op, a);
  const auto* gradient = pointer<const float>(a, "gradient");
  p.dx = pointer<float>(a, "dx");
  require_pointer(op, "gradient", gradient);
  require_vector(op, "dx", p.dx, p.rows * p.channels);
  require_within(op, "nearest", p.nearest, p.rows, 0, p.rows);
  p.gradient = static_cast<float>(static_cast<double>(*gradient) / static_cast<double>(p.rows));
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
        "x [B, C] float32 -> their mean loss, losses, norms, pulls [B], nearest [B] int64, "
        "normalised [B, C]; panels: scratch for B rounded up to 64 rows; x_row_stride, rows, "
        "channels, eps, threads, level.");
  m.def("koleo_backward_cpu", &koleo_backward,
        "gradient [] of the loss and what the forward gave -> dx [B, C] float32; rows, channels, "
        "eps, threads, level.");
}
