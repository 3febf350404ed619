"""Faults planted in kernels of ours: each must be reported, whether or not the result is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.simt.faults import Fault
from tools.simt.launch import Result, launch
from tools.simt.memory import Device, Output
from tools.simt.proofs.own_programs import OWN, Program

NAMED = {program.name: program for program in OWN}
Edit = Callable[[str], str]


@dataclass(frozen=True)
class Planted:
    """A fault: the program, how it gets there, and the kinds of report that name it."""

    name: str
    program: Program
    kinds: Sequence[str]
    defines: Sequence[str] = ()
    edit: Edit | None = None

    def report(self, **options: Any) -> Fault | None:
        """Run it; the fault that was reported."""
        ptx = self.program.ptx(*self.defines)
        try:
            self.program.run(self.edit(ptx) if self.edit else ptx, **options)
        except Fault as fault:
            return fault
        return None


def replace_nth(pattern: str, number: int, by: str) -> Edit:
    """Replace the n-th match of a pattern (from 0), and insist that there is one."""

    def edit(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx))[number]
        return ptx[: found.start()] + by + ptx[found.end() :]

    return edit


def diverging(ptx: str, **options: Any) -> tuple[float, Result]:
    """Half a warp in a collective of all."""
    out = Output(np.zeros(32, np.int32))
    return 0.0, launch(ptx, "diverging_kernel", 1, 32, [out], **options)


def deserting(ptx: str, **options: Any) -> tuple[float, Result]:
    """One warp of two at a barrier of both."""
    out = Output(np.zeros(64, np.int32))
    return 0.0, launch(ptx, "deserting_kernel", 1, 64, [out], **options)


def misaligned(ptx: str, **options: Any) -> tuple[float, Result]:
    """A pointer to floats that is no multiple of four."""
    device, x = Device(), np.zeros(400, np.float32)
    args = [device.pointer(x) + 2, Output(np.zeros(300, np.float32)), 300]
    return 0.0, launch(ptx, "softmax_kernel", 1, 128, args, device=device, **options)


def reading_output(ptx: str, **options: Any) -> tuple[float, Result]:
    """Input that nobody wrote."""
    args = [Output(np.zeros(300, np.float32)), Output(np.zeros(300, np.float32)), 300]
    return 0.0, launch(ptx, "softmax_kernel", 1, 128, args, **options)


def leaving_copy(ptx: str, **options: Any) -> tuple[float, Result]:
    """cp.async without a wait."""
    return 0.0, launch(ptx, "leaving_copy_kernel", 1, 32, [np.zeros(128, np.float32)], **options)


def leaving_load(ptx: str, **options: Any) -> tuple[float, Result]:
    """A bulk copy to an mbarrier without a wait."""
    return 0.0, launch(ptx, "leaving_load_kernel", 1, 32, [np.zeros(512, np.uint8)], **options)


def _on_32(name: str) -> Callable[..., tuple[float, Result]]:
    def run(ptx: str, **options: Any) -> tuple[float, Result]:
        out = Output(np.zeros(128, np.int32))
        return 0.0, launch(ptx, f"{name}_kernel", 1, 32, [out], **options)

    run.__name__ = name
    return run


def _of(file: str, run: Callable[..., tuple[float, Result]]) -> Program:
    arch = "compute_90a" if file == "faults.cu" else "compute_80"
    return Program(run.__name__, file, arch, run, 0.0)


BARRIER = r"bar\.sync\s+0;"
PLANTED: Sequence[Planted] = (
    Planted(
        "missing __syncthreads before a read",
        NAMED["softmax"],
        ["race", "uninitialised"],
        edit=replace_nth(BARRIER, 0, ""),
    ),
    Planted(
        "missing __syncthreads before a write",
        NAMED["softmax"],
        ["race", "hazard"],
        edit=replace_nth(BARRIER, 1, ""),
    ),
    Planted(
        "missing __syncthreads before the next cp.async",
        NAMED["gemm"],
        ["race", "hazard"],
        edit=replace_nth(BARRIER, 1, ""),
    ),
    Planted(
        "wait_group 2 for 1",
        NAMED["gemm"],
        ["in-flight"],
        edit=replace_nth(r"cp\.async\.wait_group 1;", 0, "cp.async.wait_group 2;"),
    ),
    Planted("read past the end", NAMED["softmax"], ["bounds"], ["READ_PAST_THE_END"]),
    Planted(
        "missing __syncwarp",
        NAMED["exchange"],
        ["hazard"],
        edit=replace_nth(r"bar\.warp\.sync\s+-1;", 0, ""),
    ),
    Planted(
        "shared memory read before it is written",
        NAMED["exchange"],
        ["uninitialised", "race"],
        ["UNINITIALISED"],
    ),
    Planted(
        "CTAs that meet without a counter", NAMED["exchange"], ["race"], ["WITHOUT_THE_COUNTER"]
    ),
    Planted("collective in half a warp", _of("exchange.cu", diverging), ["divergence", "deadlock"]),
    Planted("a warp missing at a barrier", _of("exchange.cu", deserting), ["deadlock"]),
    Planted("misaligned pointer", _of("softmax.cu", misaligned), ["misaligned"]),
    Planted(
        "global memory read before it is written",
        _of("softmax.cu", reading_output),
        ["uninitialised"],
    ),
    Planted(
        "dropped fence.proxy.async",
        NAMED["hopper gemm"],
        ["proxy"],
        edit=replace_nth(r"fence\.proxy\.async\.shared::cta;", 0, ""),
    ),
    Planted(
        "mbarrier of too many arrivals", NAMED["hopper gemm"], ["deadlock"], ["EMPTY_ARRIVALS=3"]
    ),
    Planted(
        "mbarrier of too few arrivals",
        NAMED["hopper gemm"],
        ["mbarrier", "race"],
        ["EMPTY_ARRIVALS=1"],
    ),
    Planted("stage released before wait_group", NAMED["hopper gemm"], ["race"], ["RELEASE_EARLY"]),
    Planted(
        "wgmma without commit_group",
        NAMED["hopper gemm"],
        ["race", "pending", "wgmma"],
        edit=replace_nth(r"wgmma\.commit_group\.sync\.aligned;", 0, ""),
    ),
    Planted(
        "a neighbour's copy read without __syncwarp", NAMED["handover"], ["hazard"], ["NEIGHBOUR"]
    ),
    Planted(
        "source of a bulk store overwritten", NAMED["hopper gemm"], ["race"], ["OVERWRITE_EARLY"]
    ),
    Planted(
        "wgmma without wgmma.fence",
        NAMED["hopper gemm"],
        ["wgmma"],
        edit=replace_nth(r"wgmma\.fence\.sync\.aligned;", 0, ""),
    ),
    Planted("left with cp.async on its way", _of("faults.cu", leaving_copy), ["pending"]),
    Planted("left with a bulk load on its way", _of("faults.cu", leaving_load), ["pending"]),
    Planted(
        "left with a bulk store on its way", _of("faults.cu", _on_32("leaving_store")), ["pending"]
    ),
    Planted("two values stored at once", _of("faults.cu", _on_32("two_values")), ["race"]),
    Planted("mbarrier initialised twice", _of("faults.cu", _on_32("twice")), ["mbarrier"]),
    Planted("no mbarrier", _of("faults.cu", _on_32("never")), ["mbarrier"]),
)
