"""The pipe model: what a kernel gives to each pipe of an SM, and the cycles that takes.

Work of a whole launch in cycles of one SM, so that it does not depend on how many CTAs were
counted. Launches follow each other, pipes within a launch overlap: the bound of a launch is its
busiest pipe, that of several launches the sum of theirs. No latency, occupancy or launch gaps, no
L2: nothing here was measured on a GPU, and every figure is called modelled.

Against published times of FlashAttention-2 at 512 to 2048 tokens the bound of forward and backward
together is 0.58 to 0.60 of what was measured, on A100 and on H100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tools.simt import Result
from tools.simt.report import A100, H100, Gpu, pipe_of

GPUS = (A100, H100)


@dataclass(frozen=True)
class Work:
    """What a launch asks of the pipes."""

    issued: float  # warp instructions of machine code, estimated
    mma_flops: float
    wgmma_flops: float
    mufu: float  # warp instructions
    shared_passes: float  # of 128 bytes, shuffles included
    hbm_bytes: float  # distinct sectors read plus distinct sectors written


def work_of(result: Result, *, issued_share: float = 1.0) -> Work:
    """The work of a launch.

    Args:
        result: of a launch with profile=True.
        issued_share: machine instructions for one of PTX.
    """
    counters = result.counters
    flops = {"mma": 0.0, "wgmma": 0.0}
    mufu = shuffles = 0
    for inst, count in result.instructions:
        if inst.op in flops:
            flops[inst.op] += result.flops.get(inst.line, 0) * count
        mufu += count * (pipe_of(inst) == "special")
        shuffles += count * (inst.op == "shfl")
    passes = sum(
        amount
        for name, amount in counters.items()
        if name.startswith("shared passes") and not name.endswith("ideal")
    )
    touched = sum(
        amount
        for name, amount in counters.items()
        if name.startswith(("touched bytes", "bulk bytes"))
    )
    return Work(
        issued=result.num_warp_instructions * issued_share,
        mma_flops=flops["mma"],
        wgmma_flops=flops["wgmma"],
        mufu=mufu,
        shared_passes=passes + shuffles,
        hbm_bytes=touched,
    )


def cycles(work: Work, gpu: Gpu) -> dict[str, float]:
    """Cycles of an SM, pipe by pipe.

    Args:
        work: of a launch.
        gpu: whose rates.
    """
    tensor = work.mma_flops / gpu.mma_share + work.wgmma_flops
    hbm_bytes_per_cycle = gpu.dram_gb_s / gpu.clock_ghz / gpu.num_sms
    return {
        "tensor": tensor / gpu.tensor_flops,
        "MUFU": work.mufu * 32 / gpu.special,
        "issue": work.issued / 4,
        "shared": work.shared_passes,
        "HBM": work.hbm_bytes / hbm_bytes_per_cycle,
    }


def bound(launches: Sequence[Work], gpu: Gpu) -> tuple[float, str]:
    """Cycles of an SM that launches take at least, one after the other, and the pipes that bind.

    Args:
        launches: work of each.
        gpu: whose rates.
    """
    total, binding = 0.0, []
    for work in launches:
        pipes = cycles(work, gpu)
        busiest = max(pipes, key=lambda pipe: pipes[pipe])
        total += pipes[busiest]
        binding.append(busiest)
    return total, " + ".join(binding)


def modelled(launches: Sequence[Work]) -> dict[str, dict[str, float | str]]:
    """GPU -> cycles by pipe, summed over launches, with the bound and what binds.

    Args:
        launches: work of each.
    """
    found: dict[str, dict[str, float | str]] = {}
    for gpu in GPUS:
        each = [cycles(work, gpu) for work in launches]
        sums = {pipe: round(sum(one[pipe] for one in each), 1) for pipe in each[0]}
        total, binding = bound(launches, gpu)
        found[gpu.name] = {**sums, "bound": round(total, 1), "binds": binding}
    return found
