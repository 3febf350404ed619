// Refusals: a false condition becomes Python's ValueError, worded as in the rest of the project.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace dinov2_fast {

// Safe without the GIL: the exception is translated after the call guard has taken it back.
[[noreturn]] inline void refuse(const char* op, const std::string& message) {
  throw pybind11::value_error(std::string(op) + ": " + message);
}

// The message is made whether it is needed or not: not for a loop.
inline void require(bool condition, const char* op, const std::string& message) {
  if (!condition)
    refuse(op, message);
}

inline void require_not_negative(const char* op, const char* name, int64_t value) {
  if (value < 0)
    refuse(op, std::string(name) + " must not be negative, got " + std::to_string(value));
}

inline void require_positive(const char* op, const char* name, int64_t value) {
  if (value < 1)
    refuse(op, std::string(name) + " must be at least 1, got " + std::to_string(value));
}

inline void require_pointer(const char* op, const char* name, const void* pointer) {
  if (pointer == nullptr)
    refuse(op, std::string(name) + " must not be a null pointer");
}

// A matrix argument given as pointer, row stride and width, all counted in elements.
inline void require_matrix(const char* op, const char* name, const void* pointer, int64_t rows,
                           int64_t width, int64_t row_stride, bool written) {
  if (rows == 0 || width == 0)
    return;
  require_pointer(op, name, pointer);
  if (row_stride < (written && rows > 1 ? width : 0))
    refuse(op, std::string(name) + ": expected a row stride of at least " +
                   std::to_string(written ? width : 0) + " elements, got " +
                   std::to_string(row_stride));
}

} // namespace dinov2_fast
