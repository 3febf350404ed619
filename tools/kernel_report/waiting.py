"""What a CTA waits for: how much of a kernel's memory traffic its products do not hide.

The pipe model lets all pipes overlap. This puts one CTA, alone on its SM, on a clock: it computes
in proportion to its loads and stores of shared memory, memory moves bytes in the order in which
they were asked for, at an SM's share of the bandwidth, and a wait for copies lasts until theirs
have moved. No latency, as in the pipe model: the figures are modelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tools.kernel_report.pipes import GPUS, Work, cycles
from tools.simt.core import Traffic
from tools.simt.report import Gpu


@dataclass(frozen=True)
class Waiting:
    """Of a CTA that has an SM for itself, in cycles."""

    computing: float  # of the busiest pipe but memory
    waiting: float


def waiting_of(work: Work, traffic: Iterable[Traffic], gpu: Gpu) -> Waiting:
    """How long a CTA computes, and how long it waits for copies.

    Args:
        work: of a launch of one CTA.
        traffic: of the same launch, with profile=True.
        gpu: whose rates.
    """
    events = list(traffic)
    pipes = cycles(work, gpu)
    cycles_per_byte = pipes.pop("HBM") / work.hbm_bytes
    computing = max(pipes.values())
    passes = max((event.passes for event in events), default=0.0)
    waiting = moved_at = 0.0
    moved_bytes, arrivals = 0, {0: 0.0}
    for event in events:
        now = event.passes / max(1.0, passes) * computing + waiting
        if event.kind == "moved":
            more = event.moved_bytes - moved_bytes
            moved_at = max(moved_at, now) + more * cycles_per_byte
            moved_bytes = event.moved_bytes
            arrivals[moved_bytes] = moved_at
        else:
            waiting += max(0.0, arrivals[event.moved_bytes] - now)
    return Waiting(computing, waiting)


def modelled_waiting(work: Work, traffic: Sequence[Traffic]) -> dict[str, dict[str, float]]:
    """GPU -> cycles that a CTA computes, and that it waits for copies.

    Args:
        work: of a launch of one CTA.
        traffic: of the same launch, with profile=True.
    """
    found = {gpu.name: waiting_of(work, traffic, gpu) for gpu in GPUS}
    return {
        name: {"computing": round(each.computing, 1), "waiting": round(each.waiting, 1)}
        for name, each in found.items()
    }
