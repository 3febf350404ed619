// Rows or tasks over threads. Small work and a single thread never enter OpenMP: its GNU runtime
// must not start a team in a forked child, and data loading forks workers that ask for one thread.
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

// Calls body(task, thread, next) on every task in [0, tasks), thread being less than `threads`.
// Each thread takes every n-th task: neighbours, which are alike in size, go to different threads.
// `next` is the task that the thread takes after this one, or its last one again.
template <typename Body> void parallel_tasks(int64_t tasks, int64_t threads, const Body& body) {
  const int64_t useful = std::max<int64_t>(std::min(tasks, threads), 1);
  const auto run = [&](int64_t thread) {
    for (int64_t task = thread; task < tasks; task += useful)
      body(task, thread, task + useful < tasks ? task + useful : task);
  };
  if (useful == 1) {
    run(0);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for num_threads(static_cast<int>(useful)) schedule(static, 1)
#endif
  for (int64_t thread = 0; thread < useful; ++thread)
    run(thread);
}

} // namespace dinov2_fast
