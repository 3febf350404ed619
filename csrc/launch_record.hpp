// What would have been launched: lets the host code of CUDA kernels run on a machine without a GPU.
// Off by default. While it is on, launches are noted here instead of handed to CUDA.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace dinov2_fast {

struct RecordedLaunch {
  std::string kernel; // mangled name of KernelName<kernel>, which spells the kernel out
  std::array<unsigned, 3> grid;
  std::array<unsigned, 3> block;
  size_t shared_bytes;
  std::string params; // the bytes of the kernel's only parameter
  uintptr_t stream;
  int device = -1; // current when it was launched; -1: no guard made one current
};

class LaunchRecorder {
public:
  static LaunchRecorder& of_process() {
    static LaunchRecorder recorder;
    return recorder;
  }

  bool is_on() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return on_;
  }

  void turn(bool on, int num_multiprocessors) {
    const std::lock_guard<std::mutex> lock(mutex_);
    on_ = on;
    device_ = -1;
    num_multiprocessors_ = num_multiprocessors;
    launches_.clear();
  }

  // In place of CUDA's current device; returns the one before.
  int exchange_device(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(device_, device);
  }

  // Of the GPU that is not there.
  int num_multiprocessors() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return num_multiprocessors_;
  }

  void note(RecordedLaunch launch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    launch.device = device_;
    launches_.push_back(std::move(launch));
  }

  std::vector<RecordedLaunch> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(launches_, {});
  }

private:
  std::mutex mutex_;
  bool on_ = false;
  int device_ = -1;
  int num_multiprocessors_ = 0;
  std::vector<RecordedLaunch> launches_;
};

} // namespace dinov2_fast
