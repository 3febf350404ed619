"""What a run measures: lines of `metrics.jsonl`, timing, memory, and whether targets collapse."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.distributed import all_reduce_mean
from dinov2_fast.losses.targets import SoftTargets
from dinov2_fast.train.run_directory import write_atomic

# Fields that differ between two runs of the same computation.
TIMING_FIELDS = frozenset({"seconds", "images_per_second", "data_wait_share", "memory_mib"})


class Meter:
    """Throughput and waiting time since the last reading.

    Args:
        images_per_step: global batch size.
        earlier_seconds: what former processes of the same run took.
    """

    def __init__(self, images_per_step: int, *, earlier_seconds: float = 0.0) -> None:
        self._images_per_step = images_per_step
        self._window_begin = time.perf_counter()
        self._run_begin = self._window_begin - earlier_seconds
        self._steps = 0
        self._wait_s = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, former processes included."""
        return time.perf_counter() - self._run_begin

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the block as waiting for data."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._wait_s += time.perf_counter() - begin

    def step_done(self) -> None:
        """Count one step."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Values since the last reading; starts the next window.

        On a GPU call it only after the host has waited for the device, or steps still in flight
        would count as done.

        Returns:
            images_per_second, data_wait_share in [0, 1] and seconds.
        """
        now = time.perf_counter()
        elapsed = max(now - self._window_begin, 1e-9)
        values = {
            "images_per_second": round(self._steps * self._images_per_step / elapsed, 3),
            "data_wait_share": round(min(self._wait_s / elapsed, 1.0), 4),
            "seconds": round(self.seconds, 3),
        }
        self._window_begin, self._steps, self._wait_s = now, 0, 0.0
        return values


def memory_mib(device: torch.device) -> float:
    """Peak memory of the allocator on a GPU, resident memory of this process on a CPU, in MiB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    except (OSError, ValueError, IndexError):
        import resource

        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)


@torch.no_grad()
def target_statistics(targets: SoftTargets, *, rows_at_once: int = 256) -> dict[str, Tensor]:
    """How sharp targets are, and how unevenly they use the prototypes.

    A collapsed run shows as an entropy at log K (every target uniform) or as a divergence that
    grows towards log K (every target the same prototype).

    Args:
        targets: of R teacher rows over K prototypes.
        rows_at_once: rows whose [., K] probabilities exist at the same time.
    Returns:
        0-d fp32 tensors, averaged over the processes: `teacher_entropy`, the mean entropy of a
        target in nats, and `target_mean_kl`, the divergence of the mean target from uniform.
    """
    num_rows, num_prototypes = targets.logits.shape
    sums = targets.log_u.new_zeros(num_prototypes + 1)  # [K + 1]: probabilities, entropy
    for begin in range(0, num_rows, rows_at_once):
        rows = slice(begin, begin + rows_at_once)
        part = SoftTargets(
            targets.logits[rows], targets.log_u, targets.log_v[rows], targets.temperature
        )
        probabilities = part.probabilities()  # [R', K]
        sums[:-1] += probabilities.sum(0)
        sums[-1] += torch.special.entr(probabilities).sum()
    means = all_reduce_mean(sums / max(num_rows, 1))
    mean_target = means[:-1] / means[:-1].sum()
    divergence = math.log(num_prototypes) - torch.special.entr(mean_target).sum()
    return {"teacher_entropy": means[-1], "target_mean_kl": divergence}


def to_floats(values: dict[str, Tensor]) -> dict[str, float | None]:
    """Tensors as JSON numbers in one transfer; None stands for what is not finite.

    Args:
        values: 0-d tensors on one device.
    """
    if not values:
        return {}
    numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()
    return {
        name: number if math.isfinite(number) else None
        for name, number in zip(values, numbers, strict=True)
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a `metrics.jsonl`, without lines that a killed run cut short.

    Args:
        path: the file; a missing one holds no records.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def truncate_metrics(path: Path, step: int) -> None:
    """Drop what a run wrote after the checkpoint it resumes from, and lines cut short.

    Args:
        path: the file; a missing one is left missing.
        step: last step that stays.
    """
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    if text.encode("utf-8") != path.read_bytes():
        write_atomic(path, text)
