// How a binding ends: it launches a kernel made for the call's type and for the widest vectors that
// its matrices allow.
#pragma once

#include "check.hpp"
#include "cuda/device/guard.cuh"
#include "cuda/device/tiles.cuh"
#include "cuda/device/types.cuh"
#include "cuda/device/vector.cuh"
#include "keywords.hpp"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace dinov2_fast {

// A matrix of the call's type, or null: then it asks for nothing.
struct Matrix {
  const void* data;
  int64_t row_stride; // elements
};

// What one kernel is made for.
template <typename T, int kElements> struct Lane {
  using type = T;
  static constexpr int kVector = kElements;
};

// launch(Lane, stream) by the keywords dtype, device and stream. Vectors are as wide as a type
// beside the matrices' allows; `others_whole` says whether everything else can be moved in them.
template <typename Beside, typename Launch>
void run_in_vectors(const char* op, const pybind11::kwargs& a, int64_t width,
                    std::initializer_list<Matrix> matrices, bool others_whole,
                    const Launch& launch) {
  const auto dtype = keyword<std::string>(a, "dtype");
  const auto device = keyword<int>(a, "device");
  const auto stream = pointer<CUstream_st>(a, "stream");
  const pybind11::gil_scoped_release release;
  run_on(op, device, [&] {
    return with_type(op, dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      constexpr int kVector = kVectorOf<T, Beside>;
      const bool whole = others_whole && width % kVector == 0 &&
                         std::all_of(matrices.begin(), matrices.end(), [](const Matrix& matrix) {
                           return whole_vectors<T, kVector>(matrix.data, matrix.row_stride);
                         });
      return whole ? launch(Lane<T, kVector>(), stream) : launch(Lane<T, 1>(), stream);
    });
  });
}

// launch(Lane, grid, stream) for tiles of a matrix of the keywords rows and, if sums over rows are
// wanted, partials and num_partials.
template <typename Launch>
void run_tiles(const char* op, const pybind11::kwargs& a, int64_t rows, int64_t width,
               const float* partials, int64_t num_partials, std::initializer_list<Matrix> matrices,
               const Launch& launch) {
  require_not_negative(op, "rows", rows);
  require_not_negative(op, "width", width);
  if (rows == 0 || width == 0)
    return; // a grid of no blocks is an error to CUDA
  require((partials != nullptr) == (num_partials > 0), op,
          "expected partials if and only if there are num_partials");
  run_in_vectors<__half>(op, a, width, matrices, true, [&](auto lane, cudaStream_t stream) {
    return launch(lane, tile_grid(rows, width / decltype(lane)::kVector, num_partials), stream);
  });
}

} // namespace dinov2_fast
