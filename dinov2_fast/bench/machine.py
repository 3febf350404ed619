"""What a figure was measured on: names, versions and the limits that this machine reaches."""

from __future__ import annotations

import functools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_LARGE_BYTES = 256 * 2**20  # more than the last cache of any device
_SIDE = {"cpu": 1536, "cuda": 8192}  # of the matrices whose product gives the arithmetic limit
_REPEATS = 10
_INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_f": "AVX-512", "avx2": "AVX2"}  # widest first
_ENOUGH_S = 3.0  # a processor without instructions for a type is slow at it; one run tells that


@functools.cache
def hardware(device: str) -> dict[str, str]:
    """Names and versions that a figure means nothing without.

    Args:
        device: "cpu" or "cuda".
    """
    found: dict[str, Any] = dict(torch.cpu.get_capabilities())
    cpu = str(found.get("cpu_name") or platform.machine())
    widest = [name for key, name in _INSTRUCTIONS.items() if found.get(key)]
    cpu += f" with {widest[0]}" if widest else ""
    commit = _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "driver": driver.splitlines()[0] if driver else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "commit": commit or "unknown",
    }


@functools.cache
def copy_bandwidth_gb_s(device: str, threads: int) -> float:
    """Bytes read plus bytes written per second by a large copy: the roof of memory-bound ops.

    Args:
        device: "cpu" or "cuda".
        threads: torch's CPU threads, already set; only part of the key.
    """
    source = torch.ones(_LARGE_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _LARGE_BYTES / _median_seconds(lambda: target.copy_(source), device) / 1e9


@functools.cache
def matmul_gflop_s(device: str, dtype: torch.dtype, threads: int) -> float:
    """Operations per second, in 1e9, of a large square matrix product: the roof of the others.

    Args:
        device: "cpu" or "cuda".
        dtype: of both factors and the product.
        threads: torch's CPU threads, already set; only part of the key.
    """
    side = _SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _median_seconds(lambda: a @ b, device) / 1e9


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def _median_seconds(run: Callable[[], object], device: str) -> float:
    # A thread's own time where one thread works: a shared machine takes slices of several ms.
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    times: list[float] = []
    for _ in range(_REPEATS):
        synchronize(device)
        begin = clock()
        run()
        synchronize(device)
        times.append(clock() - begin)
        if sum(times) > _ENOUGH_S:
            break
    return statistics.median(times)


def _output(*command: str) -> str:
    """What a command prints; empty when it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
