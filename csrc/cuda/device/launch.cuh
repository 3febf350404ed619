// The one way by which our kernels are launched: they take a Params struct by value, nothing else.
#pragma once

#include "launch_record.hpp"

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <typeinfo>

namespace dinov2_fast {

constexpr size_t kSharedBytesWithoutOptIn = 48 * 1024;

// What an SM can hold of CTAs of so many threads at half of its threads, which hides the memory's
// latency and leaves 64 registers a thread. Left to itself ptxas for sm_90 spills to fit more.
constexpr int ctas_at_half(int threads) { return 1024 / threads; }

// Multiprocessors of the current device.
inline cudaError_t count_multiprocessors(int& count) {
  LaunchRecorder& recorder = LaunchRecorder::of_process();
  if (recorder.is_on()) {
    count = recorder.num_multiprocessors();
    return cudaSuccess;
  }
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  return status == cudaSuccess
             ? cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)
             : status;
}

// Its type's name, unlike the address of a kernel, says the same on host and device.
template <auto kernel> struct KernelName {};

template <auto kernel, typename Params>
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const Params& params) {
  static_assert(std::is_same_v<decltype(kernel), void (*)(Params)>,
                "a kernel takes its Params by value");
  static_assert(std::is_trivially_copyable_v<Params>, "Params travel as bytes");
  LaunchRecorder& recorder = LaunchRecorder::of_process();
  if (recorder.is_on()) {
    recorder.note({typeid(KernelName<kernel>).name(),
                   {grid.x, grid.y, grid.z},
                   {block.x, block.y, block.z},
                   shared_bytes,
                   std::string(reinterpret_cast<const char*>(&params), sizeof(params)),
                   reinterpret_cast<uintptr_t>(stream)});
    return cudaSuccess;
  }
  const void* entry = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kSharedBytesWithoutOptIn) {
    const cudaError_t status = cudaFuncSetAttribute(
        entry, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess)
      return status;
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  const cudaError_t status = cudaLaunchKernel(entry, grid, block, arguments, shared_bytes, stream);
  return status == cudaSuccess ? cudaGetLastError() : status;
}

} // namespace dinov2_fast
