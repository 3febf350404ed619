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

// What one kernel is made for that has a residual stream and a branch, each of its type.
template <typename Stream, typename Branch, int kElements> struct StreamLane {
  using X = Stream;
  using Y = Branch;
  static constexpr int kVector = kElements;
};

template <typename T, int kVector>
bool all_whole_vectors(const std::initializer_list<Matrix>& matrices) {
  return std::all_of(matrices.begin(), matrices.end(), [](const Matrix& matrix) {
    return whole_vectors<T, kVector>(matrix.data, matrix.row_stride);
  });
}

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
      const bool whole =
          others_whole && width % kVector == 0 && all_whole_vectors<T, kVector>(matrices);
      return whole ? launch(Lane<T, kVector>(), stream) : launch(Lane<T, 1>(), stream);
    });
  });
}

// launch(StreamLane, stream) by the keywords device and stream, and by those that name the types of
// a residual stream and its branch. Vectors are of float32 and move in 16 bytes.
template <typename Launch>
void run_stream_in_vectors(const char* op, const pybind11::kwargs& a, const char* stream_dtype,
                           const char* branch_dtype, int64_t width,
                           std::initializer_list<Matrix> of_stream,
                           std::initializer_list<Matrix> of_branch,
                           std::initializer_list<const float*> vectors, const Launch& launch) {
  const auto x_dtype = keyword<std::string>(a, stream_dtype);
  const auto y_dtype = keyword<std::string>(a, branch_dtype);
  const auto device = keyword<int>(a, "device");
  const auto stream = pointer<CUstream_st>(a, "stream");
  const pybind11::gil_scoped_release release;
  run_on(op, device, [&] {
    return with_stream_and_branch(op, x_dtype, y_dtype, [&](auto x, auto y) {
      using X = typename decltype(x)::type;
      using Y = typename decltype(y)::type;
      constexpr int kVector = kVectorOf<X, Y>;
      const bool whole = width % kVector == 0 && all_whole_vectors<X, kVector>(of_stream) &&
                         all_whole_vectors<Y, kVector>(of_branch) &&
                         std::all_of(vectors.begin(), vectors.end(), [](const float* vector) {
                           return whole_vectors<float, 4>(vector, 0);
                         });
      return whole ? launch(StreamLane<X, Y, kVector>(), stream)
                   : launch(StreamLane<X, Y, 1>(), stream);
    });
  });
}

// launch(Lane, grid, stream) for tiles of a matrix of the keywords rows and, if sums over rows are
// wanted, partials and num_partials.
template <typename Launch>
void run_tiles(const char* op, const pybind11::kwargs& a, int64_t rows, Width width,
               const float* partials, int64_t num_partials, std::initializer_list<Matrix> matrices,
               const Launch& launch) {
  require_not_negative(op, "rows", rows);
  require_not_negative(op, width.name, width.elements);
  if (rows == 0 || width.elements == 0)
    return; // a grid of no blocks is an error to CUDA
  require((partials != nullptr) == (num_partials > 0), op,
          "expected partials if and only if there are num_partials");
  run_in_vectors<__half>(
      op, a, width.elements, matrices, true, [&](auto lane, cudaStream_t stream) {
        constexpr int kVector = decltype(lane)::kVector;
        return launch(lane, tile_grid(op, rows, width, kVector, num_partials), stream);
      });
}

} // namespace dinov2_fast
