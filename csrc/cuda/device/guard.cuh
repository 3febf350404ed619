// Makes a device current for a scope and puts the caller's back.
#pragma once

#include "launch_record.hpp"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace dinov2_fast {

class DeviceGuard {
public:
  explicit DeviceGuard(int device) {
    LaunchRecorder& recorder = LaunchRecorder::of_process();
    recorded_ = recorder.is_on();
    if (recorded_) {
      before_ = recorder.exchange_device(device);
      return;
    }
    status_ = cudaGetDevice(&before_);
    if (status_ == cudaSuccess && before_ != device) {
      status_ = cudaSetDevice(device);
      changed_ = status_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (recorded_)
      LaunchRecorder::of_process().exchange_device(before_);
    if (changed_)
      cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t status() const { return status_; }

private:
  int before_ = 0;
  bool changed_ = false;
  bool recorded_ = false;
  cudaError_t status_ = cudaSuccess;
};

// Launches on a device; what CUDA says against it becomes Python's RuntimeError.
template <typename Launch> void run_on(const char* op, int device, const Launch& launch) {
  const DeviceGuard guard(device);
  const cudaError_t status = guard.status() == cudaSuccess ? launch() : guard.status();
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

} // namespace dinov2_fast
