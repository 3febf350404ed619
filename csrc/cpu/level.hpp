// Instruction sets: what this processor has, and which one a call runs on.
//
// A kernel is written once, as an always-inlined function without intrinsics. The wrappers of its
// file inline it under different target attributes, so the compiler makes vectors of each width
// from the same text. Per-function targets, not per-file flags: a file built with -mavx512f leaks
// AVX-512 copies of inline library functions into the code of older processors.
#pragma once

#include "check.hpp"

#include <string>
#include <vector>

namespace dinov2_fast {

enum class Level { baseline = 0, avx2 = 1, avx512 = 2 };

inline constexpr const char* kLevelNames[] = {"baseline", "avx2", "avx512"};

inline bool has_level(Level level) {
#if defined(__x86_64__)
  switch (level) {
  case Level::avx2:
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  case Level::avx512:
    return has_level(Level::avx2) && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  default:
    return true;
  }
#else
  return level == Level::baseline;
#endif
}

// Levels of this processor, narrowest first.
inline std::vector<Level> available_levels() {
  std::vector<Level> levels;
  for (Level level : {Level::baseline, Level::avx2, Level::avx512})
    if (has_level(level))
      levels.push_back(level);
  return levels;
}

// "auto" is the widest level; a named one must exist here.
inline Level choose_level(const char* op, const std::string& name) {
  const std::vector<Level> levels = available_levels();
  if (name == "auto")
    return levels.back();
  std::string known = "auto";
  for (Level level : levels) {
    if (name == kLevelNames[static_cast<int>(level)])
      return level;
    known += std::string(", ") + kLevelNames[static_cast<int>(level)];
  }
  throw pybind11::value_error(std::string(op) + ": expected an instruction set of " + known +
                              " on this processor, got '" + name + "'");
}

} // namespace dinov2_fast
