"""The whole step against the eager reference, interleaved in fresh processes."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from dinov2_fast import environment
from dinov2_fast.bench.arithmetic import eager_flops, fast_flops
from dinov2_fast.bench.machine import copy_bandwidth_gb_s, hardware, matmul_gflop_s
from dinov2_fast.bench.setting import DTYPES, StepSetting
from dinov2_fast.errors import UserError

# What users of glibc are told to set: large blocks come from the heap, which is never trimmed.
TUNED = "glibc.malloc.mmap_threshold=34359738368:glibc.malloc.trim_threshold=34359738368"

# Contender -> what its environment has beyond this process's.
CONTENDERS: dict[str, dict[str, str]] = {
    "reference": {},
    "reference_tuned": {"GLIBC_TUNABLES": TUNED},
    "fast": {},
}


class BenchError(UserError):
    """A contender did not come to its end."""

    exit_code = 1


def compare_steps(
    setting: StepSetting, *, rounds: int, on_measured: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Time and memory of all contenders, and the ratios of the claim.

    Args:
        setting: what a step computes.
        rounds: fresh processes of each contender, one of each in turn.
        on_measured: told a line about every process that has ended.
    Returns:
        A row: the setting, the `backend` that the environment asks for, `seconds`, `peak_mib` and
        `saved_mib` by contender (medians) with the single values under `*_all`; `speed_ratio`,
        `speed_ratio_tuned`, `memory_ratio` and `saved_bytes_ratio`, reference over fast, those of
        time and peak with the smallest and largest ratio of a round under `*_range`; operations,
        limits of the machine and hardware.
        Without `reference_tuned` on a GPU, where no C library hands out memory.
    Raises:
        BenchError: a process failed; the message has its last words.
    """
    setting = setting.checked()
    names = [name for name in CONTENDERS if setting.device == "cpu" or name != "reference_tuned"]
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for index in range(rounds):
        for name in names:
            found = _measured(name, "step", setting)
            measured[name].append(found)
            if on_measured is not None:
                on_measured(
                    f"round {index + 1}/{rounds} {name}: {found['seconds']:.3f} s a step, "
                    f"{found['peak_mib']:.0f} MiB"
                )
    saved = {
        name: _measured(name, "saved_bytes", setting)["saved_mib"] for name in ("reference", "fast")
    }
    row: dict[str, Any] = {"kind": "step", **dataclasses.asdict(setting), "rounds": rounds}
    row["backend"] = environment.backend() or environment.preferred_backend() or "auto"
    for unit in ("seconds", "peak_mib"):
        every = {name: [found[unit] for found in each] for name, each in measured.items()}
        row[unit] = {name: statistics.median(each) for name, each in every.items()}
        row[f"{unit}_all"] = every
    row["saved_mib"] = saved
    row |= _ratio(row, "speed_ratio", "seconds", "reference")
    if "reference_tuned" in names:
        row |= _ratio(row, "speed_ratio_tuned", "seconds", "reference_tuned")
    row |= _ratio(row, "memory_ratio", "peak_mib", "reference")
    row["saved_bytes_ratio"] = saved["reference"] / saved["fast"]
    return {**row, **_limits(setting, row["seconds"]), **hardware(setting.device)}


def summary(row: dict[str, Any]) -> str:
    """A row of `compare_steps` in a few lines for a person."""
    lines = [
        f"{row['arch']}, {row['prototypes']} prototypes, {row['batch_size']} images, "
        f"{row['dtype']}, {row['threads']} threads of {row['hardware']}"
    ]
    for name, seconds in row["seconds"].items():
        lines.append(f"{name:16} {seconds:8.3f} s a step  {row['peak_mib'][name]:8.0f} MiB")
    for key, meaning in (
        ("speed_ratio", "times the reference's speed"),
        ("speed_ratio_tuned", "times its speed with a tuned allocator"),
        ("memory_ratio", "times less memory at the peak"),
    ):
        if key in row:
            low, high = row[f"{key}_range"]
            lines.append(f"{row[key]:6.2f} {meaning} ({low:.2f} to {high:.2f})")
    lines.append(f"{row['saved_bytes_ratio']:6.2f} times less kept for the backward pass")
    lines.append(f"{row['arithmetic_ratio']:6.2f} times fewer operations in matrix products")
    return "\n".join(lines)


def _ratio(row: dict[str, Any], key: str, unit: str, base: str) -> dict[str, Any]:
    """Median over median, and the range of the rounds' own ratios."""
    pairs = zip(row[f"{unit}_all"][base], row[f"{unit}_all"]["fast"], strict=True)
    rounds = [reference / fast for reference, fast in pairs]
    return {
        key: row[unit][base] / row[unit]["fast"],
        f"{key}_range": [min(rounds), max(rounds)],
    }


def _limits(setting: StepSetting, seconds: dict[str, float]) -> dict[str, Any]:
    """Operations of both steps, and what share of the machine's own product speed they reach."""
    threads = torch.get_num_threads()
    torch.set_num_threads(setting.threads)
    try:
        reachable = {
            name: matmul_gflop_s(setting.device, dtype, setting.threads)
            for name, dtype in DTYPES.items()
            if name in ("fp32", setting.dtype)
        }
        bandwidth = copy_bandwidth_gb_s(setting.device, setting.threads)
    finally:
        torch.set_num_threads(threads)
    flops = {"reference": eager_flops(setting), "fast": fast_flops(setting)}
    best = max(reachable.values())
    return {
        "gflop": {name: count / 1e9 for name, count in flops.items()},
        "arithmetic_ratio": flops["reference"] / flops["fast"],
        "matmul_gflop_s": reachable,
        "copy_gb_s": bandwidth,
        "share_of_matmul": {
            name: count / 1e9 / seconds[name] / best for name, count in flops.items()
        },
    }


def _measured(name: str, measure: str, setting: StepSetting) -> dict[str, float]:
    """What a fresh process says."""
    words = [name, measure, json.dumps(dataclasses.asdict(setting))]
    finished = subprocess.run(
        [sys.executable, "-m", "dinov2_fast.bench.contender", *words],
        env=environment.extended(CONTENDERS[name]),
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or ["nothing on its error output"])[-1]
        raise BenchError(
            f"bench: {name} ended with exit code {finished.returncode}: {last}; "
            "-9 means that the system ran out of memory: use a smaller --batch-size"
        )
    return json.loads(finished.stdout.splitlines()[-1])
