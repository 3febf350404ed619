// Layer normalisation on the CPU, of all rows or of a selection, and its gradient.
#include "check.hpp"
#include "cpu/level.hpp"
#include "cpu/rows.hpp"
#include "cpu/scalar_math.hpp"
#include "cpu/stream.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

struct Forward {
  const void* x;       // [T, C]
  const float* weight; // [C]
  const float* bias;   // [C]
  const int64_t* rows; // [R], or null: all
  void* y;             // [R, C]
  float* mean;         // [R], or null: not wanted
  float* rstd;         // [R]
  int64_t channels;
  int64_t x_row_stride; // elements
  int64_t y_row_stride;
  float eps;
  bool stream; // y
};

// x_hat = (source - mean - shift) * rstd * inverse: of an input with shift 0 and inverse 1; of an
// output with shift bias and inverse 1 / weight, without mean (and then without rstd).
struct Backward {
  const void* dy;       // [R, C]
  const void* source;   // [R, C], or [T, C] rows of an input
  const float* shift;   // [C]
  const float* inverse; // [C]
  const float* mean;    // [R], or null
  const float* rstd;    // [R]
  const float* weight;  // [C]
  const int64_t* source_rows;
  const int64_t* dx_rows;
  void* dx;        // [T, C] or [R, C]
  float* partials; // [blocks, 2, C] sums for weight and bias
  float* kept;     // [blocks, 2, C] dy and x_hat of the row in work, where rows go one by one
  int64_t channels;
  int64_t dy_row_stride;
  int64_t source_row_stride;
  int64_t dx_row_stride;
  bool add; // to dx, instead of overwriting it
};

// A number of each of two rows: rows are taken in pairs, which share what is read per channel and
// hide each other's latencies. The last of an odd number is its own partner.
struct Pair {
  float first, second;
};

// Four sums of a row at a time hide the latency of the additions.
template <typename X>
[[gnu::always_inline]] inline Pair sums_of(const X* x, const X* z, int64_t count) {
  const int64_t quarter = count / 4;
  float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f, e = 0.0f, f = 0.0f, g = 0.0f, h = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d, e, f, g, h)
  for (int64_t i = 0; i < quarter; ++i) {
    a += load(x[i]);
    b += load(x[i + quarter]);
    c += load(x[i + 2 * quarter]);
    d += load(x[i + 3 * quarter]);
    e += load(z[i]);
    f += load(z[i + quarter]);
    g += load(z[i + 2 * quarter]);
    h += load(z[i + 3 * quarter]);
  }
  for (int64_t i = 4 * quarter; i < count; ++i) {
    a += load(x[i]);
    e += load(z[i]);
  }
  return {(a + b) + (c + d), (e + f) + (g + h)};
}

[[gnu::always_inline]] inline float square(float x) { return x * x; }

template <typename X>
[[gnu::always_inline]] inline Pair sums_of_squares(const X* x, const X* z, Pair mean,
                                                   int64_t count) {
  const int64_t quarter = count / 4;
  float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f, e = 0.0f, f = 0.0f, g = 0.0f, h = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d, e, f, g, h)
  for (int64_t i = 0; i < quarter; ++i) {
    a += square(load(x[i]) - mean.first);
    b += square(load(x[i + quarter]) - mean.first);
    c += square(load(x[i + 2 * quarter]) - mean.first);
    d += square(load(x[i + 3 * quarter]) - mean.first);
    e += square(load(z[i]) - mean.second);
    f += square(load(z[i + quarter]) - mean.second);
    g += square(load(z[i + 2 * quarter]) - mean.second);
    h += square(load(z[i + 3 * quarter]) - mean.second);
  }
  for (int64_t i = 4 * quarter; i < count; ++i) {
    a += square(load(x[i]) - mean.first);
    e += square(load(z[i]) - mean.second);
  }
  return {(a + b) + (c + d), (e + f) + (g + h)};
}

template <typename X, typename Y> struct ForwardRows {
  [[gnu::always_inline]] static inline void run(const Forward& p, int64_t, int64_t begin,
                                                int64_t end) {
    const int64_t channels = p.channels, half = channels / 2;
    const auto width = static_cast<float>(channels);
    const auto input = [&](int64_t row) {
      return static_cast<const X*>(p.x) + selected(p.rows, std::min(row, end - 1)) * p.x_row_stride;
    };
    for (int64_t row = begin; row < end; row += 2) {
      const X* x = input(row);
      const X* z = input(row + 1);
      // Asked for by halves, for the reason that `put_row` asks in parts.
      const X* next_x = input(row + 2);
      const X* next_z = input(row + 3);
      prefetch_row(next_x, half);
      const Pair sums = sums_of(x, z, channels);
      const Pair mean{sums.first / width, sums.second / width};
      prefetch_row(next_x + half, channels - half);
      const Pair squares = sums_of_squares(x, z, mean, channels);
      prefetch_row(next_z, half);
      finish(p, row, x, mean.first, squares.first / width);
      prefetch_row(next_z + half, channels - half);
      finish(p, std::min(row + 1, end - 1), z, mean.second, squares.second / width);
    }
    finish_streams(p.stream);
  }

  [[gnu::always_inline]] static inline void finish(const Forward& p, int64_t row, const X* x,
                                                   float mean, float variance) {
    const float rstd = 1.0f / std::sqrt(variance + p.eps);
    const float* weight = p.weight;
    const float* bias = p.bias;
    put_row(
        static_cast<Y*>(p.y) + row * p.y_row_stride, p.channels, p.stream,
        [=](auto at, int64_t i) { return (at(x, i) - mean) * rstd * at(weight, i) + at(bias, i); });
    p.rstd[row] = rstd;
    if (p.mean != nullptr)
      p.mean[row] = mean;
  }
};

template <typename D, typename G, typename S> struct BackwardRows {
  struct Row {
    const G* dy;
    const S* source;
    D* dx;
    float mean, rstd, scale;
  };

  // Means over a row's channels of g = dy * weight and of g * x_hat.
  struct Means {
    float g, along;
  };

  static constexpr bool kConverts = !std::is_same_v<G, float>;

  // Whether two rows and the five vectors they share stay in a first-level cache beside what is
  // asked for ahead of them; wider rows go one by one.
  static constexpr bool pairs_fit(int64_t channels) {
    constexpr int64_t kMostBytes = 24 << 10;
    constexpr int64_t kBytes = 2 * (sizeof(G) + sizeof(S) + sizeof(D)) + 5 * sizeof(float);
    return channels * kBytes <= kMostBytes;
  }

  [[gnu::always_inline]] static inline Row row_of(const Backward& p, int64_t row) {
    return {static_cast<const G*>(p.dy) + row * p.dy_row_stride,
            static_cast<const S*>(p.source) + selected(p.source_rows, row) * p.source_row_stride,
            static_cast<D*>(p.dx) + selected(p.dx_rows, row) * p.dx_row_stride,
            p.mean == nullptr ? 0.0f : p.mean[row],
            p.rstd[row],
            p.mean == nullptr ? 1.0f : p.rstd[row]};
  }

  [[gnu::always_inline]] static inline void prefetch(const Backward& p, int64_t row, int64_t end) {
    if (row >= end)
      return;
    const Row next = row_of(p, row);
    prefetch_row(next.source, p.channels);
    prefetch_row(next.dy, p.channels);
    prefetch_row(next.dx, p.channels);
  }

  // The means of one row or two, whose terms of the sums over rows are added in their order. Of a
  // single row, what finishing it needs again is kept; a pair would gain little by it.
  template <bool kTwo>
  [[gnu::always_inline]] static inline void
  reduce(const Backward& p, float* __restrict dweight, float* __restrict dbias, float* kept,
         const Row& a, const Row& b, Means& of_a, Means& of_b) {
    const int64_t channels = p.channels;
    const float* __restrict shift = p.shift;
    const float* __restrict inverse = p.inverse;
    const float* __restrict weight = p.weight;
    const G* __restrict dy_a = a.dy;
    const G* __restrict dy_b = b.dy;
    const S* __restrict source_a = a.source;
    const S* __restrict source_b = b.source;
    float* __restrict kept_dy = kept;
    float* __restrict kept_x_hat = kept + channels;
    const float mean_a = a.mean, mean_b = b.mean, scale_a = a.scale, scale_b = b.scale;
    float sum_a = 0.0f, along_a = 0.0f, sum_b = 0.0f, along_b = 0.0f;
#pragma omp simd reduction(+ : sum_a, along_a, sum_b, along_b)
    for (int64_t i = 0; i < channels; ++i) {
      const float x_hat = (load(source_a[i]) - mean_a - shift[i]) * scale_a * inverse[i];
      const float incoming = load(dy_a[i]), g = incoming * weight[i];
      float to_weight = dweight[i] + incoming * x_hat, to_bias = dbias[i] + incoming;
      sum_a += g;
      along_a += g * x_hat;
      if constexpr (!kTwo) {
        kept_x_hat[i] = x_hat;
        if constexpr (kConverts)
          kept_dy[i] = incoming;
      }
      if constexpr (kTwo) {
        const float x_hat_b = (load(source_b[i]) - mean_b - shift[i]) * scale_b * inverse[i];
        const float incoming_b = load(dy_b[i]), g_b = incoming_b * weight[i];
        to_weight += incoming_b * x_hat_b;
        to_bias += incoming_b;
        sum_b += g_b;
        along_b += g_b * x_hat_b;
      }
      dweight[i] = to_weight;
      dbias[i] = to_bias;
    }
    const auto width = static_cast<float>(channels);
    of_a = {sum_a / width, along_a / width};
    of_b = {sum_b / width, along_b / width};
  }

  // dx of a row; kKept: of what `reduce` has kept of it.
  template <bool kKept>
  [[gnu::always_inline]] static inline void finish(const Backward& p, const float* kept,
                                                   const Row& r, Means of_row) {
    const int64_t channels = p.channels;
    const float* __restrict shift = p.shift;
    const float* __restrict inverse = p.inverse;
    const float* __restrict weight = p.weight;
    const float* __restrict kept_dy = kept;
    const float* __restrict kept_x_hat = kept + channels;
    const G* __restrict dy = r.dy;
    const S* __restrict source = r.source;
    D* __restrict dx = r.dx;
    const float mean = r.mean, scale = r.scale, sum = of_row.g, along = of_row.along;
    // One channel is its own mean and has no gradient; a fused multiply-add would leave g's
    // rounding error there.
    const float outer = channels == 1 ? 0.0f : r.rstd;
    if (p.add) {
#pragma omp simd
      for (int64_t i = 0; i < channels; ++i) {
        const float x_hat =
            kKept ? kept_x_hat[i] : (load(source[i]) - mean - shift[i]) * scale * inverse[i];
        const float incoming = kKept && kConverts ? kept_dy[i] : load(dy[i]);
        store(dx[i], load(dx[i]) + outer * (incoming * weight[i] - sum - x_hat * along));
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < channels; ++i) {
        const float x_hat =
            kKept ? kept_x_hat[i] : (load(source[i]) - mean - shift[i]) * scale * inverse[i];
        const float incoming = kKept && kConverts ? kept_dy[i] : load(dy[i]);
        store(dx[i], outer * (incoming * weight[i] - sum - x_hat * along));
      }
    }
  }

  [[gnu::always_inline]] static inline void run(const Backward& p, int64_t block, int64_t begin,
                                                int64_t end) {
    float* dweight = p.partials + block * 2 * p.channels;
    float* dbias = dweight + p.channels;
    float* kept = p.kept + block * 2 * p.channels;
    for (int64_t i = 0; i < 2 * p.channels; ++i)
      dweight[i] = 0.0f;
    int64_t row = begin;
    for (; row + 2 <= end && pairs_fit(p.channels); row += 2) {
      const Row a = row_of(p, row), b = row_of(p, row + 1);
      Means of_a, of_b;
      prefetch(p, row + 2, end);
      reduce<true>(p, dweight, dbias, kept, a, b, of_a, of_b);
      prefetch(p, row + 3, end);
      finish<false>(p, kept, a, of_a);
      finish<false>(p, kept, b, of_b);
    }
    for (; row < end; ++row) {
      const Row a = row_of(p, row);
      Means of_a, unused;
      prefetch_row(a.dx, p.channels);
      if (row + 1 < end) {
        const Row next = row_of(p, row + 1);
        prefetch_row(next.source, p.channels);
        prefetch_row(next.dy, p.channels);
      }
      reduce<false>(p, dweight, dbias, kept, a, a, of_a, unused);
      finish<true>(p, kept, a, of_a);
    }
  }
};

void layer_norm_forward(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t rows, uintptr_t y,
                        uintptr_t mean, uintptr_t rstd, int64_t num_x_rows, int64_t num_rows,
                        int64_t channels, int64_t x_row_stride, int64_t y_row_stride, double eps,
                        const std::string& x_dtype, const std::string& y_dtype, int threads,
                        const std::string& level_name, const char* op) {
  Forward p{reinterpret_cast<const void*>(x),
            reinterpret_cast<const float*>(weight),
            reinterpret_cast<const float*>(bias),
            reinterpret_cast<const int64_t*>(rows),
            reinterpret_cast<void*>(y),
            reinterpret_cast<float*>(mean),
            reinterpret_cast<float*>(rstd),
            channels,
            x_row_stride,
            y_row_stride,
            static_cast<float>(eps),
            false};
  require_numbers(op, channels, threads);
  require_rows(op, p.rows, num_rows, num_x_rows);
  require_matrix(op, "x", p.x, num_x_rows, channels, x_row_stride, false);
  require_matrix(op, "y", p.y, num_rows, channels, y_row_stride, true);
  require_vector(op, "weight", p.weight, channels);
  require_vector(op, "bias", p.bias, channels);
  require_vector(op, "rstd", p.rstd, num_rows);
  const Level level = choose_level(op, level_name);
  with_float_type(op, "x", x_dtype, [&](auto x_type) {
    with_float_type(op, "y", y_dtype, [&](auto y_type) {
      using Y = typename decltype(y_type)::type;
      p.stream = streams<Y>(num_rows, channels);
      using Rows = ForwardRows<typename decltype(x_type)::type, Y>;
      const auto run = at_level<Rows, Forward>(level);
      parallel_rows(num_rows, channels, threads,
                    [&](int64_t begin, int64_t end) { run(p, 0, begin, end); });
    });
  });
}

// Of the backward's scratch [2 + 2 blocks, 2, C]: shift and inverse, the sums, those of each block,
// what each block keeps of a row.
float* scratch_part(uintptr_t scratch, int64_t part, int64_t channels) {
  return reinterpret_cast<float*>(scratch) + part * 2 * channels;
}

// Of an output: bias and 1 / weight; without a bias, what changes nothing.
void fill_shift_and_inverse(const float* weight, const float* bias, int64_t channels,
                            float* vectors) {
  for (int64_t i = 0; i < channels; ++i) {
    vectors[i] = bias == nullptr ? 0.0f : bias[i];
    vectors[channels + i] = bias == nullptr ? 1.0f : 1.0f / weight[i];
  }
}

void layer_norm_backward(uintptr_t dy, uintptr_t source, uintptr_t bias, uintptr_t mean,
                         uintptr_t rstd, uintptr_t weight, uintptr_t source_rows, uintptr_t dx_rows,
                         uintptr_t dx, uintptr_t scratch, uintptr_t dweight, uintptr_t dbias,
                         int64_t num_source_rows, int64_t num_dx_rows, int64_t num_rows,
                         int64_t channels, int64_t block_rows, int64_t dy_row_stride,
                         int64_t source_row_stride, int64_t dx_row_stride, bool add,
                         const std::string& dy_dtype, const std::string& source_dtype,
                         const std::string& dx_dtype, int threads, const std::string& level_name,
                         const char* op) {
  Backward p{reinterpret_cast<const void*>(dy),
             reinterpret_cast<const void*>(source),
             scratch_part(scratch, 0, channels),
             scratch_part(scratch, 0, channels) + channels,
             reinterpret_cast<const float*>(mean),
             reinterpret_cast<const float*>(rstd),
             reinterpret_cast<const float*>(weight),
             reinterpret_cast<const int64_t*>(source_rows),
             reinterpret_cast<const int64_t*>(dx_rows),
             reinterpret_cast<void*>(dx),
             scratch_part(scratch, 2, channels),
             nullptr,
             channels,
             dy_row_stride,
             source_row_stride,
             dx_row_stride,
             add};
  require_numbers(op, channels, threads, block_rows);
  p.kept = scratch_part(scratch, 2 + blocks_of(num_rows, block_rows), channels);
  require_rows(op, p.source_rows, num_rows, num_source_rows);
  require_rows(op, p.dx_rows, num_rows, num_dx_rows);
  require_matrix(op, "dy", p.dy, num_rows, channels, dy_row_stride, false);
  require_matrix(op, "source", p.source, num_source_rows, channels, source_row_stride, false);
  require_matrix(op, "dx", p.dx, num_dx_rows, channels, dx_row_stride, true);
  require_vector(op, "weight", p.weight, channels);
  require_vector(op, "rstd", p.rstd, num_rows);
  require_vector(op, "scratch", reinterpret_cast<const void*>(scratch), channels);
  require_vector(op, "dweight", reinterpret_cast<const void*>(dweight), channels);
  require_vector(op, "dbias", reinterpret_cast<const void*>(dbias), channels);
  fill_shift_and_inverse(p.weight, reinterpret_cast<const float*>(bias), channels,
                         scratch_part(scratch, 0, channels));
  const Level level = choose_level(op, level_name);
  with_float_type(op, "dx", dx_dtype, [&](auto dx_type) {
    with_float_type(op, "dy", dy_dtype, [&](auto dy_type) {
      with_float_type(op, "source", source_dtype, [&](auto source_type) {
        using Rows =
            BackwardRows<typename decltype(dx_type)::type, typename decltype(dy_type)::type,
                         typename decltype(source_type)::type>;
        const auto run = at_level<Rows, Backward>(level);
        parallel_blocks(
            num_rows, block_rows, channels, threads,
            [&](int64_t block, int64_t begin, int64_t end) { run(p, block, begin, end); });
      });
    });
  });
  float* sums = scratch_part(scratch, 1, channels);
  add_partials(p.partials, blocks_of(num_rows, block_rows), 2 * channels, sums, threads);
  std::copy_n(sums, channels, reinterpret_cast<float*>(dweight));
  std::copy_n(sums + channels, channels, reinterpret_cast<float*>(dbias));
}

} // namespace
} // namespace dinov2_fast

void bind_layer_norm_cpu(py::module_& m) {
  using namespace dinov2_fast;
  m.def("layer_norm_forward_cpu", &layer_norm_forward,
        "x [T, C], weight and bias [C] float32, rows [R] int64 or 0 -> y [R, C], mean [R] or 0 and "
        "rstd [R] float32; pointers, sizes and row strides in elements.",
        py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("rows"), py::arg("y"),
        py::arg("mean"), py::arg("rstd"), py::arg("num_x_rows"), py::arg("num_rows"),
        py::arg("channels"), py::arg("x_row_stride"), py::arg("y_row_stride"), py::arg("eps"),
        py::arg("x_dtype"), py::arg("y_dtype"), py::arg("threads"), py::arg("level"),
        py::arg("op") = "layer_norm_forward_cpu", py::call_guard<py::gil_scoped_release>());
  m.def(
      "layer_norm_backward_cpu", &layer_norm_backward,
      "dy [R, C], source (an output with bias [C], an input with mean [R], or normalised) -> dx, "
      "overwritten or added to, dweight and dbias [C] float32, over scratch [2 + 2 blocks, 2, C]; "
      "pointers, sizes and row strides in elements.",
      py::arg("dy"), py::arg("source"), py::arg("bias"), py::arg("mean"), py::arg("rstd"),
      py::arg("weight"), py::arg("source_rows"), py::arg("dx_rows"), py::arg("dx"),
      py::arg("scratch"), py::arg("dweight"), py::arg("dbias"), py::arg("num_source_rows"),
      py::arg("num_dx_rows"), py::arg("num_rows"), py::arg("channels"), py::arg("block_rows"),
      py::arg("dy_row_stride"), py::arg("source_row_stride"), py::arg("dx_row_stride"),
      py::arg("add"), py::arg("dy_dtype"), py::arg("source_dtype"), py::arg("dx_dtype"),
      py::arg("threads"), py::arg("level"), py::arg("op") = "layer_norm_backward_cpu",
      py::call_guard<py::gil_scoped_release>());
}
