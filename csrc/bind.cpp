// The extension: one binder per op and device, listed by CMake in binders.hpp.
#include "binders.hpp"
#include "cpu/level.hpp"

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
          names.append(dinov2_fast::kLevelNames[static_cast<int>(level)]);
        return names;
      },
      "Instruction sets the CPU kernels can use on this processor, narrowest first.");
  bind_every_op(m);
}
