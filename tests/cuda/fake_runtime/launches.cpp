// Launches a kernel as the bindings do, on a runtime that prints what it is told. Its grid is as
// large as the device has multiprocessors.
// Arguments: the device that is wanted, bytes of shared memory, and the call that fails.
#include "cuda/device/guard.cuh"
#include "cuda/device/launch.cuh"

#include <cstdlib>

struct Params {
  int number;
};

void example_kernel(const Params) {}

int main(int, char** arguments) {
  using namespace dinov2_fast;
  const int device = std::atoi(arguments[1]);
  const auto shared_bytes = static_cast<size_t>(std::atoi(arguments[2]));
  failing = arguments[3];
  try {
    run_on("example", device, [&] {
      if (failing == "refusal")
        throw std::invalid_argument("example: refused");
      int count = 0;
      const cudaError_t status = count_multiprocessors(count);
      if (status != cudaSuccess)
        return status;
      return launch<example_kernel>(dim3(2, count), dim3(32), shared_bytes,
                                    reinterpret_cast<cudaStream_t>(0x5eed), Params{7});
    });
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
  }
  std::printf("device %d\n", current_device);
}
