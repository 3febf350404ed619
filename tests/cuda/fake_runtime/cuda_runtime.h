// The part of CUDA's runtime that guard.cuh and launch.cuh call: it prints each call, and fails
// where a test wants that.
#pragma once

#include <cstddef>
#include <cstdio>
#include <string>

enum cudaError_t { cudaSuccess, cudaErrorOfTest };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = struct CUstream_st*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline int current_device = 0;
inline std::string failing; // the call that fails

inline cudaError_t answer(const char* call) {
  return failing == call ? cudaErrorOfTest : cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return answer("get device");
}

inline cudaError_t cudaSetDevice(int device) {
  std::printf("set device %d\n", device);
  if (answer("set device") == cudaSuccess)
    current_device = device;
  return answer("set device");
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = 10 + device;
  return answer("get attribute");
}

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  std::printf("allow %d bytes\n", bytes);
  return answer("allow");
}

inline cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3 block, void** arguments,
                                    size_t shared_bytes, cudaStream_t stream) {
  std::printf("launch (%u %u %u) (%u %u %u) %zu bytes, argument %d, stream %p, device %d\n", grid.x,
              grid.y, grid.z, block.x, block.y, block.z, shared_bytes,
              *static_cast<int*>(arguments[0]), static_cast<void*>(stream), current_device);
  return answer("launch");
}

inline cudaError_t cudaGetLastError() { return answer("last error"); }
inline const char* cudaGetErrorString(cudaError_t) { return "as the test wants"; }
