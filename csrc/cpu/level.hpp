// Instruction sets: what this processor has, and which one a call runs on.
//
// A kernel is written once, as an always-inlined function without intrinsics. The wrappers of its
// file inline it under different target attributes, so the compiler makes vectors of each width
// from the same text. Per-function targets, not per-file flags: a file built with -mavx512f leaks
// AVX-512 copies of inline library functions into the code of older processors.
#pragma once

#include "check.hpp"

#include <algorithm>
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

inline std::vector<std::string> names_of(const std::vector<Level>& levels) {
  std::vector<std::string> names;
  for (Level level : levels)
    names.emplace_back(name_of(level));
  return names;
}

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
#endif

// What levels depend on, as CPUID and XGETBV say it.
struct Processor {
  bool avx2 = false, avx512 = false; // with FMA; with BW, DQ and VL
  bool intel = false, bf16_dot = false;
  bool bf16_tiles = false; // AMX, and the system keeps tiles when it switches threads
};

inline Processor this_processor() {
  Processor p;
#if defined(__x86_64__)
  p.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  p.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  p.intel = __builtin_cpu_is("intel");
#if defined(DINOV2_FAST_AVX512_BF16)
  p.bf16_dot = (leaf7().eax1 & 1u << 5) != 0;
#endif
#if defined(DINOV2_FAST_AMX)
  constexpr uint32_t kTilesAndBf16 = 1u << 24 | 1u << 22, kTileState = 1u << 17 | 1u << 18;
  if (p.avx512 && (leaf7().edx0 & kTilesAndBf16) == kTilesAndBf16) {
    uint32_t low, high; // AVX-512 implies that XGETBV may be executed
    asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    p.bf16_tiles = (low & kTileState) == kTileState;
  }
#endif
#endif
  return p;
}

// Asks the system to let this process use tiles, whose state takes 8 KiB a thread.
inline bool ask_for_tiles() {
#if defined(DINOV2_FAST_AMX)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Levels of a processor, narrowest first; the system is asked for tiles only where they are.
template <typename Ask> std::vector<Level> levels_of(const Processor& p, const Ask& ask) {
  std::vector<Level> levels{Level::baseline};
  if (p.avx2)
    levels.push_back(Level::avx2);
  if (!p.avx2 || !p.avx512)
    return levels;
  levels.push_back(Level::avx512);
  const bool tiles = p.bf16_tiles && ask();
  // Intel's dot product does half of what its float units do; it comes without AMX there only in
  // one generation, which is better off without it.
  if (p.bf16_dot && (tiles || !p.intel))
    levels.push_back(Level::avx512_bf16);
  if (tiles)
    levels.push_back(Level::amx);
  return levels;
}

// Levels of this processor, narrowest first.
inline const std::vector<Level>& available_levels() {
  static const std::vector<Level> levels = levels_of(this_processor(), ask_for_tiles);
  return levels;
}

inline bool contains(const std::vector<Level>& levels, Level level) {
  return std::find(levels.begin(), levels.end(), level) != levels.end();
}

// "auto" is the widest level; a named one must be among them.
inline Level choose_level(const char* op, const std::string& name,
                          const std::vector<Level>& levels = available_levels()) {
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
