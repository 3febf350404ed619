// Arguments by name, for functions that take too many of them to keep in order.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace dinov2_fast {

template <typename T> T keyword(const pybind11::kwargs& a, const char* name) {
  return a[name].cast<T>();
}

template <typename T> T* pointer(const pybind11::kwargs& a, const char* name) {
  return reinterpret_cast<T*>(keyword<uintptr_t>(a, name));
}

} // namespace dinov2_fast
