// The extension: one binder per op and device, listed by CMake in binders.hpp.
#include "binders.hpp"
#include "cpu/level.hpp"
#include "launch_record.hpp"

#include <pybind11/stl.h>

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels on raw pointers: they allocate nothing and know nothing of torch.";
  m.attr("version") = DINOV2_FAST_VERSION;
  m.attr("cuda_archs") = DINOV2_FAST_HELD_ARCHS;
  m.def(
      "cpu_levels",
      [] {
        py::list names;
        for (dinov2_fast::Level level : dinov2_fast::available_levels())
          names.append(dinov2_fast::name_of(level));
        return names;
      },
      "Instruction sets the CPU kernels can use on this processor, narrowest first.");
  m.def(
      "record_launches_cuda",
      [](bool on, int num_multiprocessors) {
        dinov2_fast::LaunchRecorder::of_process().turn(on, num_multiprocessors);
      },
      "While on, CUDA kernels are noted instead of launched: no GPU is needed, nothing computed. "
      "Grids that depend on the multiprocessors of a GPU are those of one with so many.",
      py::arg("on"), py::arg("num_multiprocessors") = 108);
  m.def(
      "take_launches_cuda",
      [] {
        py::list launches;
        for (const auto& l : dinov2_fast::LaunchRecorder::of_process().take())
          launches.append(py::make_tuple(l.kernel, l.grid, l.block, l.shared_bytes,
                                         py::bytes(l.params), l.device, l.stream));
        return launches;
      },
      "What was noted since the last call: (kernel, grid, block, shared bytes, Params, device, "
      "stream).");
  bind_every_op(m);
}
