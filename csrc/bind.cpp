// The extension: one binder per op and device, listed by CMake in binders.hpp.
#include "binders.hpp"
#include "cpu/level.hpp"
#include "launch_record.hpp"

#include <pybind11/stl.h>

#include <utility>

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels on raw pointers: they allocate nothing and know nothing of torch.";
  m.attr("version") = DINOV2_FAST_VERSION;
  m.attr("cuda_archs") = DINOV2_FAST_HELD_ARCHS;
  m.def(
      "cpu_levels", [] { return dinov2_fast::names_of(dinov2_fast::available_levels()); },
      "Instruction sets the CPU kernels can use on this processor, narrowest first.");
  m.def(
      "cpu_levels_of",
      [](bool avx2, bool avx512, bool intel, bool bf16_dot, bool bf16_tiles, bool permitted) {
        int asked = 0;
        const auto ask = [&] { return ++asked, permitted; };
        const auto levels =
            dinov2_fast::levels_of({avx2, avx512, intel, bf16_dot, bf16_tiles}, ask);
        return std::make_pair(dinov2_fast::names_of(levels), asked);
      },
      "Instruction sets of a processor with such features whose system permits tiles or does not, "
      "and how often the system was asked.",
      py::kw_only(), py::arg("avx2"), py::arg("avx512"), py::arg("intel"), py::arg("bf16_dot"),
      py::arg("bf16_tiles"), py::arg("permitted"));
  m.def("ask_for_tiles", &dinov2_fast::ask_for_tiles,
        "Asks the system to let this process use AMX tiles; whether it does.");
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
