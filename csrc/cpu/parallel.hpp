// Rows over threads. Small work and a single thread never enter OpenMP: its GNU runtime must not
// start a team in a forked child, and data loading forks workers that ask for one thread.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dinov2_fast {

// Below this many elements a thread gains less than waking it costs.
constexpr int64_t kElementsPerThread = 32768;

// Calls body(begin, end) on disjoint ranges that cover [0, rows).
template <typename Body>
void parallel_rows(int64_t rows, int64_t width, int threads, const Body& body) {
  const int64_t useful = std::min<int64_t>(rows, rows * width / kElementsPerThread);
  const int64_t ranges = std::min<int64_t>(threads, useful);
  if (ranges <= 1) {
    body(int64_t{0}, rows);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for num_threads(static_cast<int>(ranges)) schedule(static, 1)
#endif
  for (int64_t i = 0; i < ranges; ++i)
    body(rows * i / ranges, rows * (i + 1) / ranges);
}

} // namespace dinov2_fast
