"""What every benchmark row holds, and how one is measured.

Run with `pytest benchmarks --benchmark-only`; `--full` adds large shapes. A row states op, backend,
dtype, shape and mode, the time's quartiles, achieved bandwidth or arithmetic and its share of what
this machine reaches, peak memory, hardware, driver, versions and commit.

What an op bound by memory reaches is said twice. Against a large copy: the speed of the memory.
And against a copy of as many bytes as the op moves, after the same flush: at a few MB that copy is
slower than a large one, since it too writes back what the flush left in the caches and runs code
that is not in them. The second is what ordinary loads and stores can reach at the op's size; stores
past the caches go beyond it.

The C library's allocator is set as the command line sets it, for every contender: otherwise what
was allocated and freed around a row decides whether page faults are measured with it.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast.backends import DTYPES, availability
from dinov2_fast.bench.machine import copy_bandwidth_gb_s, hardware, synchronize
from dinov2_fast.train.memory import reuse_freed_memory

WARMUP_ROUNDS = 5
LEAST_ROUNDS, MOST_ROUNDS = 3, 50
SECONDS_PER_ROW = 0.5  # of timed rounds, flushes between them included
COPY_ROUNDS = 5
FLUSH_BYTES = 256 * 2**20  # more than the last cache of any device

# Rows on the CPU run on one thread and count its own time: a busy machine's scheduler takes slices
# of several ms, many times what is measured. Rows on a GPU count elapsed time.
CPU_ROW = pytest.mark.benchmark(timer=time.thread_time)
GPU_ROW = pytest.mark.benchmark(timer=time.perf_counter)


def skip_unless_available(
    op: str, backend: str, device: str, dtype: torch.dtype | None = None
) -> None:
    """Skip a row, with the reason, when this machine cannot compute it.

    Args:
        op: stem of the op.
        backend: of the row.
        device: "cpu" or "cuda".
        dtype: of the row, where backends take different ones.
    """
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    reason = availability(op, device)[backend]
    taken = DTYPES.get((op, backend, device))
    if not reason and dtype is not None and taken is not None and dtype not in taken:
        reason = f"it does not take {dtype}"
    if reason:
        pytest.skip(f"{op}: {backend} on {device}: {reason}")


def measure(
    benchmark: Any,
    run: Callable[[], object],
    *,
    op: str,
    backend: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    mode: str,
    device: str,
    num_bytes: int,
    num_flops: int = 0,
    prepare: Callable[[], object] | None = None,
) -> None:
    """Time a function with cold caches and one CPU thread, and complete the row.

    Under --benchmark-disable the function runs once and nothing is measured.

    Args:
        benchmark: pytest-benchmark's fixture.
        run: the work; its result is dropped.
        op: stem of the op.
        backend: what is measured: a backend, or "compiled reference".
        dtype: float type of the main input.
        shape: of the main input.
        mode: part of the op, as "forward" or "forward+backward".
        device: "cpu" or "cuda".
        num_bytes: bytes the op must move: every input and output once.
        num_flops: useful operations; 0 for ops bound by memory.
        prepare: restores before every round, untimed, what the work overwrites.
    """
    if benchmark.disabled:
        if prepare is not None:
            prepare()
        benchmark(run)
        return
    reuse_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    scratch = torch.empty(FLUSH_BYTES // 4, device=device)

    def set_up() -> None:
        if prepare is not None:
            prepare()
        scratch.zero_()  # L2 and L3 hold nothing of the last round
        synchronize(device)

    def timed() -> None:
        run()
        synchronize(device)

    try:
        warmup_rounds, rounds = _warm_up(lambda: (set_up(), timed()))
        _reset_peak(device)
        benchmark.pedantic(timed, setup=set_up, rounds=rounds)
        peak_mib = _peak_mib(device)
        reachable = copy_bandwidth_gb_s(device, 1)
        equal_copy_s = None if num_flops else _equal_copy_seconds(num_bytes, set_up, device)
    finally:
        torch.set_num_threads(threads)
    stats = benchmark.stats.stats
    seconds = stats.median
    benchmark.group = f"{op} {mode} {device} {str(dtype).removeprefix('torch.')} {shape}"
    benchmark.extra_info.update(
        op=op,
        backend=backend,
        dtype=str(dtype).removeprefix("torch."),
        shape=list(shape),
        mode=mode,
        device=device,
        median_us=seconds * 1e6,
        quartiles_us=[stats.q1 * 1e6, stats.q3 * 1e6],
        bytes=num_bytes,
        gb_s=num_bytes / seconds / 1e9,
        share_of_copy_bandwidth=num_bytes / seconds / 1e9 / reachable,
        share_of_equal_copy=equal_copy_s and equal_copy_s / seconds,
        flops=num_flops,
        tflop_s=num_flops / seconds / 1e12,
        peak_mib=peak_mib,
        rounds=rounds,
        warmup_rounds=warmup_rounds,
        caches="flushed",
        clock="elapsed" if device == "cuda" else "thread",
        threads=1,
        **hardware(device),
    )


def _equal_copy_seconds(num_bytes: int, set_up: Callable[[], None], device: str) -> float:
    """Seconds of a copy that reads and writes as many bytes together, timed as the work is."""
    source = torch.ones(max(num_bytes // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = time.perf_counter if device == "cuda" else time.thread_time
    times: list[float] = []
    for _ in range(COPY_ROUNDS):
        set_up()
        begin = clock()
        target.copy_(source)
        synchronize(device)
        times.append(clock() - begin)
    return statistics.median(times)


def _warm_up(run: Callable[[], object]) -> tuple[int, int]:
    """Run until compilers and allocator have settled; rounds run, and rounds to be timed."""
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < WARMUP_ROUNDS and sum(seconds) < SECONDS_PER_ROW):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    rounds = int(SECONDS_PER_ROW / min(seconds))
    return len(seconds), min(max(rounds, LEAST_ROUNDS), MOST_ROUNDS)


def gradient_of(run: Callable[[Tensor], Tensor], x: Tensor, incoming: Tensor) -> Tensor:
    """One forward and backward pass of a function of one tensor."""
    (gradient,) = torch.autograd.grad(run(x), x, incoming)
    return gradient


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak_mib(device: str) -> float:
    """Peak memory: of torch's allocator on a GPU, of the whole process so far on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
