// From a dtype's name to a type that a kernel is made for.
#pragma once

#include "check.hpp"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>
#include <type_traits>

namespace dinov2_fast {

template <typename T> struct Type {
  using type = T;
};

// body(Type<T>) for the named type.
template <typename Body>
cudaError_t with_type(const char* op, const std::string& dtype, const Body& body) {
  if (dtype == "float32")
    return body(Type<float>());
  if (dtype == "float16")
    return body(Type<__half>());
  if (dtype != "bfloat16")
    refuse(op, "expected float32, float16 or bfloat16, got " + dtype);
  return body(Type<__nv_bfloat16>());
}

// A type that is known only to the kernel at run time.
enum class FloatType { float32, float16, bfloat16 };

inline FloatType float_type(const char* op, const std::string& dtype) {
  FloatType found = FloatType::bfloat16;
  with_type(op, dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (std::is_same_v<T, float>)
      found = FloatType::float32;
    if (std::is_same_v<T, __half>)
      found = FloatType::float16;
    return cudaSuccess;
  });
  return found;
}

// body(Type<T>) for a type that tensor cores multiply and float32 accumulates.
template <typename Body>
cudaError_t with_half_type(const char* op, const std::string& dtype, const Body& body) {
  if (dtype == "float16")
    return body(Type<__half>());
  if (dtype != "bfloat16")
    refuse(op, "expected float16 or bfloat16, got " + dtype);
  return body(Type<__nv_bfloat16>());
}

// body(Type<Stream>, Type<Branch>) for a residual stream and what a branch computes in: the same
// type, or float32 on one side.
template <typename Body>
cudaError_t with_stream_and_branch(const char* op, const std::string& stream,
                                   const std::string& branch, const Body& body) {
  if (stream == branch)
    return with_type(op, stream, [&](auto type) { return body(type, type); });
  if (branch == "float32")
    return with_type(op, stream, [&](auto type) { return body(type, Type<float>()); });
  if (stream != "float32")
    refuse(op, "expected one type, or float32 beside another, got " + stream + " and " + branch);
  return with_type(op, branch, [&](auto type) { return body(Type<float>(), type); });
}

} // namespace dinov2_fast
