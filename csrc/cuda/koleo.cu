// KoLeo on CUDA: rows scaled to length 1, the nearest other row of each, and the gradient of the
// distances' logarithms. Products are float32 and summed channel after channel, the same way for
// every pair, so that equal rows tie and the lowest of them is found. Nothing is atomic: a row
// gathers the pulls of the rows whose nearest it is, in their order.
#include "check.hpp"
#include "cuda/device/guard.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/limits.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vector.cuh"
#include "keywords.hpp"

#include <cuda_pipeline.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>

namespace py = pybind11;

namespace dinov2_fast {
namespace {

constexpr int kRowWarps = 4;              // warps of a CTA, each with a row of its own
constexpr int64_t kMaxThreads = 256;      // of a CTA with one row
constexpr int64_t kRowsOfLargeTile = 513; // below it, small tiles occupy more multiprocessors

// A CTA's products: kTile queries with as many keys, kPerThread of both a thread.
template <int kTile> struct Tile {
  static constexpr int kPerThread = kTile == 16 ? 2 : 4;
  static constexpr int kSide = kTile / kPerThread;
  static constexpr int kThreads = kSide * kSide;
  static constexpr int kWarpsAcross = kSide / 8;       // a warp is 4 queries by 8 keys
  static constexpr int kDepth = kTile == 16 ? 64 : 32; // channels held at a time
  static constexpr int kPitch = kDepth + 4; // 8 rows' vectors of one column lie in all 32 banks
  static_assert(kSide % 8 == 0 && kPitch % 32 == 4, "no two lanes of a phase share a bank");
};

struct ForwardParams {
  const float* x;    // [B, C]
  float* normalised; // [B, C]
  float* norms;      // [B], the lengths that rows were divided by, at least eps
  int64_t* nearest;  // [B]
  float* losses;     // [B], -log(distance + eps)
  float* pulls;      // [B], 1 / ((distance + eps) distance); 0 between equal rows
  uint64_t* bests;   // [B, num_splits], the nearest row of a part of the keys; see `packed`
  int64_t x_row_stride;
  int64_t channels; // C
  int rows;         // B
  int num_splits;
  float eps;
};

struct BackwardParams {
  const float* gradients;  // [B], of the losses
  const float* normalised; // [B, C]
  const float* norms;      // [B]
  const int64_t* nearest;  // [B]
  const float* pulls;      // [B]
  float* dx;               // [B, C]
  int64_t channels;        // C
  int rows;                // B
  float eps;
};

// body(c) for the vectors of a lane's, or a thread's, part of a row.
template <int kVector, typename Body>
__device__ void for_each_vector(int64_t channels, int first, int step, const Body& body) {
  for (int64_t c = static_cast<int64_t>(first) * kVector; c < channels; c += step * kVector)
    body(c);
}

__device__ int row_of_warp() { return blockIdx.x * kRowWarps + threadIdx.y; }

template <int kVector>
__global__ void __launch_bounds__(kLanes* kRowWarps) koleo_normalise_kernel(const ForwardParams p) {
  const int row = row_of_warp();
  if (row >= p.rows)
    return;
  const float* x = p.x + row * p.x_row_stride;
  double squares = 0.0;
  for_each_vector<kVector>(p.channels, threadIdx.x, kLanes, [&](int64_t c) {
    const auto values = load_vector<float, kVector>(x + c);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      squares += static_cast<double>(values.at[i]) * values.at[i];
  });
  const float length = static_cast<float>(sqrt(warp_sum(squares)));
  const float norm = length < p.eps ? p.eps : length; // keeps NaN
  for_each_vector<kVector>(p.channels, threadIdx.x, kLanes, [&](int64_t c) {
    auto values = load_vector<float, kVector>(x + c);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      values.at[i] /= norm;
    store_vector(p.normalised + row * p.channels + c, values);
  });
  if (threadIdx.x == 0)
    p.norms[row] = norm;
}

// A product and the number of its key as one integer, which is the larger the nearer the key is,
// and of equally near ones the lower its number. 0 is less than any: no key, or NaN alone.
__device__ uint64_t packed(float product, int key) {
  const uint32_t bits = __float_as_uint(product + 0.0f); // -0 ties with 0
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | ~static_cast<uint32_t>(key);
}

__device__ uint64_t unless_smaller(uint64_t a, uint64_t b) { return a < b ? b : a; }

// Begins to copy kDepth channels of kTile rows to shared memory, with zeros for what does not
// exist.
template <int kTile, int kVector>
__device__ void copy_tile(float* to, const ForwardParams& p, int first_row, int64_t first_channel) {
  using T = Tile<kTile>;
  constexpr int kAcross = T::kDepth / kVector;
  static_assert(kTile * kAcross % T::kThreads == 0, "every thread copies as much");
#pragma unroll 4
  for (int i = 0; i < kTile * kAcross / T::kThreads; ++i) {
    const int place = i * T::kThreads + threadIdx.x;
    const int row = first_row + place / kAcross, within = place % kAcross * kVector;
    const int64_t channel = first_channel + within;
    const bool exists = row < p.rows && channel < p.channels;
    const float* from = exists ? p.normalised + row * p.channels + channel : p.normalised;
    constexpr int kBytes = kVector * sizeof(float);
    __pipeline_memcpy_async(to + place / kAcross * T::kPitch + within, from, kBytes,
                            exists ? 0 : kBytes);
  }
}

// Adds the products of a thread's queries and keys over the channels that are held.
template <int kTile>
__device__ void multiply(const float* queries, const float* keys,
                         float (&products)[Tile<kTile>::kPerThread][Tile<kTile>::kPerThread]) {
  using T = Tile<kTile>;
#pragma unroll
  for (int c = 0; c < T::kDepth; c += 4) {
    float4 query[T::kPerThread];
#pragma unroll
    for (int i = 0; i < T::kPerThread; ++i)
      query[i] = *reinterpret_cast<const float4*>(queries + i * T::kSide * T::kPitch + c);
#pragma unroll
    for (int j = 0; j < T::kPerThread; ++j) {
      const float4 key = *reinterpret_cast<const float4*>(keys + j * T::kSide * T::kPitch + c);
#pragma unroll
      for (int i = 0; i < T::kPerThread; ++i) {
        products[i][j] = fmaf(query[i].x, key.x, products[i][j]);
        products[i][j] = fmaf(query[i].y, key.y, products[i][j]);
        products[i][j] = fmaf(query[i].z, key.z, products[i][j]);
        products[i][j] = fmaf(query[i].w, key.w, products[i][j]);
      }
    }
  }
}

// The nearest key of kTile queries, among the keys of one split.
template <int kTile, int kVector>
__global__ void __launch_bounds__(Tile<kTile>::kThreads)
    koleo_nearest_kernel(const ForwardParams p) {
  using T = Tile<kTile>;
  __shared__ alignas(16) float tiles[2][2][kTile * T::kPitch]; // of queries and of keys
  __shared__ uint64_t of_warps[kTile][T::kWarpsAcross];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int x = lane % 8 + warp % T::kWarpsAcross * 8, y = lane / 8 + warp / T::kWarpsAcross * 4;
  const int first_query = blockIdx.x * kTile;
  const int num_tiles = (p.rows + kTile - 1) / kTile;
  const int tiles_of_split = (num_tiles + p.num_splits - 1) / p.num_splits;
  const int first_tile = blockIdx.y * tiles_of_split;
  const int depths = static_cast<int>((p.channels + T::kDepth - 1) / T::kDepth);
  const int steps = max(min(tiles_of_split, num_tiles - first_tile), 0) * depths;

  float products[T::kPerThread][T::kPerThread] = {}, best[T::kPerThread];
  int best_key[T::kPerThread];
#pragma unroll
  for (int i = 0; i < T::kPerThread; ++i) {
    best[i] = -INFINITY;
    best_key[i] = -1;
  }
  const auto copy_step = [&](int step) {
    const int first_key = (first_tile + step / depths) * kTile;
    const int64_t channel = static_cast<int64_t>(step % depths) * T::kDepth;
    copy_tile<kTile, kVector>(tiles[step % 2][0], p, first_query, channel);
    copy_tile<kTile, kVector>(tiles[step % 2][1], p, first_key, channel);
  };
  if (steps > 0)
    copy_step(0);
  for (int step = 0; step < steps; ++step) {
    const int buffer = step % 2;
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads(); // the copies of all threads are there, and the other buffer is free
    if (step + 1 < steps)
      copy_step(step + 1);
    multiply<kTile>(tiles[buffer][0] + y * T::kPitch, tiles[buffer][1] + x * T::kPitch, products);
    if ((step + 1) % depths != 0)
      continue; // these keys have channels left
    const int first_key = (first_tile + step / depths) * kTile;
#pragma unroll
    for (int j = 0; j < T::kPerThread; ++j) {
      const int key = first_key + x + j * T::kSide;
#pragma unroll
      for (int i = 0; i < T::kPerThread; ++i) {
        const bool other = key < p.rows && key != first_query + y + i * T::kSide;
        if (other && products[i][j] > best[i]) { // the lowest number wins a tie
          best[i] = products[i][j];
          best_key[i] = key;
        }
        products[i][j] = 0.0f;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < T::kPerThread; ++i) {
    uint64_t found = best_key[i] < 0 ? 0 : packed(best[i], best_key[i]);
#pragma unroll
    for (int step = 4; step > 0; step /= 2)
      found = unless_smaller(found, __shfl_xor_sync(kAllLanes, found, step));
    if (lane % 8 == 0)
      of_warps[y + i * T::kSide][warp % T::kWarpsAcross] = found;
  }
  __syncthreads();
  const int query = first_query + threadIdx.x;
  if (threadIdx.x >= kTile || query >= p.rows)
    return;
  uint64_t found = of_warps[threadIdx.x][0];
#pragma unroll
  for (int i = 1; i < T::kWarpsAcross; ++i)
    found = unless_smaller(found, of_warps[threadIdx.x][i]);
  p.bests[static_cast<int64_t>(query) * p.num_splits + blockIdx.y] = found;
}

template <int kVector>
__global__ void __launch_bounds__(kLanes* kRowWarps) koleo_distance_kernel(const ForwardParams p) {
  const int row = row_of_warp();
  if (row >= p.rows)
    return;
  uint64_t found = 0;
  for (int split = threadIdx.x; split < p.num_splits; split += kLanes)
    found = unless_smaller(found, p.bests[static_cast<int64_t>(row) * p.num_splits + split]);
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    found = unless_smaller(found, __shfl_xor_sync(kAllLanes, found, step));
  const int64_t none = row == 0 ? 1 : 0; // where every product is NaN
  const int64_t nearest = found == 0 ? none : ~static_cast<uint32_t>(found);
  double squares = 0.0;
  bool differs = false;
  for_each_vector<kVector>(p.channels, threadIdx.x, kLanes, [&](int64_t c) {
    const auto own = load_vector<float, kVector>(p.normalised + row * p.channels + c);
    const auto other = load_vector<float, kVector>(p.normalised + nearest * p.channels + c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float apart = own.at[i] - other.at[i] + p.eps;
      squares += static_cast<double>(apart) * apart;
      differs |= own.at[i] != other.at[i];
    }
  });
  const double distance = sqrt(warp_sum(squares));
  differs = __any_sync(kAllLanes, differs);
  if (threadIdx.x != 0)
    return;
  p.nearest[row] = nearest;
  p.losses[row] = static_cast<float>(-log(distance + p.eps));
  p.pulls[row] = differs ? static_cast<float>(1.0 / ((distance + p.eps) * distance)) : 0.0f;
}

// One CTA a row. A thread adds to its part of dx, which nobody else touches.
template <int kVector>
__global__ void __launch_bounds__(kMaxThreads, ctas_at_half(kMaxThreads))
    koleo_backward_kernel(const BackwardParams p) {
  __shared__ double of_warps[kMaxThreads / kLanes][1];
  const int row = blockIdx.x, lane = threadIdx.x % kLanes, threads = blockDim.x;
  const float* unit = p.normalised + row * p.channels;
  float* dx = p.dx + row * p.channels;
  const auto for_own_vectors = [&](const auto& body) {
    for_each_vector<kVector>(p.channels, threadIdx.x, threads, body);
  };
  // What the loss of a row adds to the gradient, of itself with sign 1 and of its nearest with -1.
  const auto pull = [&](int of, float sign, bool first) {
    const float factor = -sign * p.gradients[of] * p.pulls[of];
    if (factor == 0.0f && !first)
      return; // between equal rows eps alone has a direction
    const float* from = p.normalised + of * p.channels;
    const float* to = p.normalised + p.nearest[of] * p.channels;
    for_own_vectors([&](int64_t c) {
      const auto own = load_vector<float, kVector>(from + c);
      const auto other = load_vector<float, kVector>(to + c);
      Vector<float, kVector> sum = {};
      if (!first)
        sum = load_writable<float, kVector>(dx + c);
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (factor != 0.0f)
          sum.at[i] += factor * (own.at[i] - other.at[i] + p.eps);
      store_vector(dx + c, sum);
    });
  };
  pull(row, 1.0f, true);
  for (int begin = 0; begin < p.rows; begin += kLanes) {
    const int of = begin + lane;
    unsigned followers = __ballot_sync(kAllLanes, of < p.rows && p.nearest[of] == row);
    for (; followers != 0; followers &= followers - 1)
      pull(begin + __ffs(followers) - 1, -1.0f, false);
  }
  const float norm = p.norms[row];
  double along[1] = {};
  for_own_vectors([&](int64_t c) {
    const auto sum = load_writable<float, kVector>(dx + c);
    const auto direction = load_vector<float, kVector>(unit + c);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      along[0] += static_cast<double>(sum.at[i]) * direction.at[i];
  });
  block_reduce<Sum>(along, of_warps);
  // A row no longer than eps was divided by a constant.
  const float radial = norm > p.eps ? static_cast<float>(along[0]) : 0.0f;
  for_own_vectors([&](int64_t c) {
    auto sum = load_writable<float, kVector>(dx + c);
    const auto direction = load_vector<float, kVector>(unit + c);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      sum.at[i] = (sum.at[i] - radial * direction.at[i]) / norm;
    store_vector(dx + c, sum);
  });
}

// body(kVector as a constant): 4 if every vector is whole, else 1.
template <typename Body> cudaError_t with_width(bool whole, const Body& body) {
  return whole ? body(std::integral_constant<int, 4>()) : body(std::integral_constant<int, 1>());
}

template <int kTile>
cudaError_t launch_nearest(const ForwardParams& p, bool whole, cudaStream_t stream) {
  const dim3 grid((p.rows + kTile - 1) / kTile, p.num_splits);
  return with_width(whole, [&](auto width) {
    return launch<koleo_nearest_kernel<kTile, width()>>(grid, dim3(Tile<kTile>::kThreads), 0,
                                                        stream, p);
  });
}

cudaError_t launch_forward(const ForwardParams& p, cudaStream_t stream) {
  const dim3 grid((p.rows + kRowWarps - 1) / kRowWarps), block(kLanes, kRowWarps);
  const bool whole = p.channels % 4 == 0 && whole_vectors<float, 4>(p.normalised, 0);
  cudaError_t status =
      with_width(whole && whole_vectors<float, 4>(p.x, p.x_row_stride), [&](auto width) {
        return launch<koleo_normalise_kernel<width()>>(grid, block, 0, stream, p);
      });
  if (status == cudaSuccess)
    status = p.rows < kRowsOfLargeTile ? launch_nearest<16>(p, whole, stream)
                                       : launch_nearest<64>(p, whole, stream);
  if (status == cudaSuccess)
    status = with_width(whole, [&](auto width) {
      return launch<koleo_distance_kernel<width()>>(grid, block, 0, stream, p);
    });
  return status;
}

void require_sizes(const char* op, int64_t rows, int64_t channels) {
  require(rows >= 2, op, "rows must be at least 2, got " + std::to_string(rows));
  require_at_most(op, "rows", rows, kMaxInt - 64); // room to round up to tiles
  require_positive(op, "channels", channels);
}

// The most channels whose steps a CTA counts in 32 bits: one a depth, for each tile of its keys.
template <int kTile> int64_t max_channels(int64_t rows, int64_t num_splits) {
  const int64_t num_tiles = (rows + kTile - 1) / kTile;
  return kMaxInt / ((num_tiles + num_splits - 1) / num_splits) * Tile<kTile>::kDepth;
}

void koleo_forward(const py::kwargs& a) {
  constexpr const char* op = "koleo_forward_cuda";
  const auto rows = keyword<int64_t>(a, "rows");
  const auto channels = keyword<int64_t>(a, "channels");
  const auto num_splits = keyword<int64_t>(a, "num_splits");
  require_sizes(op, rows, channels);
  require_positive(op, "num_splits", num_splits);
  require_at_most(op, "num_splits", num_splits, kMaxAlongY);
  require_at_most(op, "channels", channels,
                  rows < kRowsOfLargeTile ? max_channels<16>(rows, num_splits)
                                          : max_channels<64>(rows, num_splits));
  const ForwardParams p{pointer<const float>(a, "x"),
                        pointer<float>(a, "normalised"),
                        pointer<float>(a, "norms"),
                        pointer<int64_t>(a, "nearest"),
                        pointer<float>(a, "losses"),
                        pointer<float>(a, "pulls"),
                        pointer<uint64_t>(a, "bests"),
                        keyword<int64_t>(a, "x_row_stride"),
                        channels,
                        static_cast<int>(rows),
                        static_cast<int>(num_splits),
                        keyword<float>(a, "eps")};
  const auto device = keyword<int>(a, "device");
  const auto stream = pointer<CUstream_st>(a, "stream");
  require_matrix(op, "x", p.x, rows, channels, p.x_row_stride, false);
  require_pointer(op, "normalised", p.normalised);
  require_pointer(op, "norms", p.norms);
  require_pointer(op, "nearest", p.nearest);
  require_pointer(op, "losses", p.losses);
  require_pointer(op, "pulls", p.pulls);
  require_pointer(op, "bests", p.bests);
  const py::gil_scoped_release release;
  run_on(op, device, [&] { return launch_forward(p, stream); });
}

void koleo_backward(const py::kwargs& a) {
  constexpr const char* op = "koleo_backward_cuda";
  const auto rows = keyword<int64_t>(a, "rows");
  const auto channels = keyword<int64_t>(a, "channels");
  require_sizes(op, rows, channels);
  const BackwardParams p{pointer<const float>(a, "gradients"),
                         pointer<const float>(a, "normalised"),
                         pointer<const float>(a, "norms"),
                         pointer<const int64_t>(a, "nearest"),
                         pointer<const float>(a, "pulls"),
                         pointer<float>(a, "dx"),
                         channels,
                         static_cast<int>(rows),
                         keyword<float>(a, "eps")};
  const auto device = keyword<int>(a, "device");
  const auto stream = pointer<CUstream_st>(a, "stream");
  require_pointer(op, "gradients", p.gradients);
  require_pointer(op, "normalised", p.normalised);
  require_pointer(op, "norms", p.norms);
  require_pointer(op, "nearest", p.nearest);
  require_pointer(op, "pulls", p.pulls);
  require_pointer(op, "dx", p.dx);
  const bool whole = channels % 4 == 0 && whole_vectors<float, 4>(p.normalised, 0) &&
                     whole_vectors<float, 4>(p.dx, 0);
  const py::gil_scoped_release release;
  run_on(op, device, [&] {
    return with_width(whole, [&](auto width) {
      const int64_t lanes = (channels + width() - 1) / width();
      const int64_t warps = std::min((lanes + kLanes - 1) / kLanes, kMaxThreads / kLanes);
      return launch<koleo_backward_kernel<width()>>(
          dim3(p.rows), dim3(static_cast<unsigned>(warps * kLanes)), 0, stream, p);
    });
  });
}

} // namespace
} // namespace dinov2_fast

void bind_koleo_cuda(py::module_& m) {
  using namespace dinov2_fast;
  m.def("koleo_forward_cuda", &koleo_forward,
        "x [B, C] float32 -> losses, norms, pulls [B], nearest [B] int64, normalised [B, C]; bests "
        "[B, num_splits] int64 is scratch; x_row_stride, rows, channels, eps.");
  m.def("koleo_backward_cuda", &koleo_backward,
        "gradients [B] of the losses and what the forward gave -> dx [B, C] float32; rows, "
        "channels, eps.");
}
