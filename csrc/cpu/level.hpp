// Instruction sets: what this processor has, and which one a call runs on.
//
// A kernel is written once, as an always-inlined function without intrinsics. The wrappers of its
// file inline it under different target attributes, so the compiler makes vectors of each width
// from the same text. Per-function targets, not per-file flags: a file built with -mavx512f leaks
// AVX-512 copies of inline library functions into the code of older processors.
#pragma once

#include "check.hpp"

#include <cstdint>
#include <string>
#include <vector>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(DINOV2_FAST_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dinov2_fast {

// The last two are avx512 with products of bf16 matrices; ops that have none take them for avx512.
enum class Level { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

inline constexpr Level kLevels[] = {Level::baseline, Level::avx2, Level::avx512, Level::avx512_bf16,
                                    Level::amx};
inline constexpr const char* kLevelNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

inline const char* name_of(Level level) { return kLevelNames[static_cast<int>(level)]; }

#if defined(__x86_64__)
// Registers that CPUID's leaf 7 gives: EAX of subleaf 1 and EDX of subleaf 0.
struct Leaf7 {
  uint32_t eax1 = 0, edx0 = 0;
};

inline Leaf7 leaf7() {
  Leaf7 found;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
    return found;
  found.edx0 = d;
  const uint32_t subleaves = a;
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d))
    found.eax1 = a;
  return found;
}

// Whether the processor has AMX tiles of bf16, the system keeps them when it switches threads
// (bits 17 and 18 of XCR0), and gives them to this process, which has to ask for their 8 KiB.
inline bool may_use_amx() {
#if defined(DINOV2_FAST_AMX)
  constexpr uint32_t kTilesAndBf16 = 1u << 24 | 1u << 22;
  if ((leaf7().edx0 & kTilesAndBf16) != kTilesAndBf16 || !__builtin_cpu_supports("avx512f"))
    return false;
  uint32_t low, high; // AVX-512 implies that XGETBV may be executed
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr uint32_t kTileState = 1u << 17 | 1u << 18;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return (low & kTileState) == kTileState &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Intel's dot product does half of what its float units do; it comes without AMX there only in one
// generation, which is better off without it.
inline bool has_fast_bf16_dot() {
#if defined(DINOV2_FAST_AVX512_BF16)
  return (leaf7().eax1 & 1u << 5) != 0 && (!__builtin_cpu_is("intel") || may_use_amx());
#else
  return false;
#endif
}
#endif

inline bool has_level(Level level) {
#if defined(__x86_64__)
  switch (level) {
  case Level::avx2:
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  case Level::avx512:
    return has_level(Level::avx2) && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  case Level::avx512_bf16: {
    static const bool fast = has_fast_bf16_dot();
    return has_level(Level::avx512) && fast;
  }
  case Level::amx: {
    static const bool permitted = may_use_amx();
    return has_level(Level::avx512) && permitted;
  }
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
  for (Level level : kLevels)
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
    if (name == name_of(level))
      return level;
    known += std::string(", ") + name_of(level);
  }
  throw pybind11::value_error(std::string(op) + ": expected an instruction set of " + known +
                              " on this processor, got '" + name + "'");
}

} // namespace dinov2_fast
