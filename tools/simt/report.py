"""Counters -> modelled lower bounds of a kernel's time, pipe by pipe, on A100 and H100.

A bound counts work and divides by the pipe's rate, as if the pipe were never idle and the CTAs
filled the machine evenly. Tensor, shared, L2 and DRAM work is what the kernel does; the counts of
the other pipes are of PTX, which ptxas still merges and shortens, so they are estimates. Nothing
here was measured on a GPU: call the figures modelled wherever they are shown.

Source: NVIDIA A100 and H100 architecture white papers; CUDA C++ programming guide, arithmetic
throughput; the share of wgmma's rate that mma.sync reaches on H100 is from published benchmarks.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from tools.simt.launch import Result
from tools.simt.program import Inst

FREE = {"mov", "cvta", "ret", "exit", "bra", "setmaxnreg", "fence", "membar", "griddepcontrol"}
SPECIAL = {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div"}
MEMORY = {"ld", "st", "atom", "red", "cp", "ldmatrix", "stmatrix", "shfl", "movmatrix"}
BYTES_PER_SECTOR = 32


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU: lanes per cycle of an SM unless said otherwise."""

    name: str
    num_sms: int
    clock_ghz: float
    fp32: int
    fp64: int
    integer: int
    special: int
    memory: int  # lanes a load, store or shuffle moves
    tensor_flops: int  # bf16, dense, through the GPU's own instruction (mma.sync, wgmma)
    mma_share: float  # of tensor_flops that mma.sync reaches
    dram_gb_s: float
    l2_bytes: int  # per cycle of the whole GPU


A100 = Gpu("A100", 108, 1.41, 64, 32, 64, 16, 32, 2048, 1.0, 2039, 5120)
H100 = Gpu("H100", 132, 1.755, 128, 64, 64, 16, 32, 4096, 0.62, 3350, 5632)


def pipe_of(inst: Inst) -> str:
    """The pipe of a streaming multiprocessor that executes an instruction."""
    if inst.op in ("mma", "wgmma"):
        return "tensor" if "mma_async" in inst.mods or inst.op == "mma" else "free"
    if inst.op in FREE or inst.op in ("bar", "barrier", "mbarrier", "elect"):
        return "free"
    if inst.op in MEMORY:
        return "free" if "param" in inst.mods else "memory"
    kind = inst.type
    if inst.op in SPECIAL and kind != "f64":
        return "special" if kind[0] == "f" or "f16" in kind else "integer"
    if inst.op == "cvt":
        floats = [t for t in inst.types if t[0] == "f" or t[0] == "b"]
        whole = any(mod in ("rni", "rzi", "rmi", "rpi") for mod in inst.mods)
        # Between float types of at most 32 bits ptxas shifts and packs.
        moves = len(floats) in (0, 2) and "f64" not in floats and not whole
        return "integer" if moves else "special"
    if kind == "f64":
        return "fp64"
    arithmetic = inst.op in ("add", "sub", "mul", "fma", "mad")
    return "fp32" if arithmetic and (kind == "f32" or "f16" in kind) else "integer"


@dataclass
class Bound:
    """A modelled lower bound on one GPU."""

    gpu: Gpu
    cycles: dict[str, float]  # of an SM, by pipe

    @property
    def binding(self) -> str:
        """The pipe that takes longest."""
        return max(self.cycles, key=lambda pipe: self.cycles[pipe])

    @property
    def microseconds(self) -> float:
        """The modelled lower bound of the kernel's time."""
        return self.cycles[self.binding] / self.gpu.clock_ghz / 1e3


@dataclass
class Report:
    """What a launch did, and its modelled bounds."""

    warp_instructions: dict[str, int]  # by pipe
    matrix_flops: float
    useful_share: float | None
    counters: dict[str, float]
    bounds: list[Bound]

    def __str__(self) -> str:
        """Two tables for people."""
        lines = ["warp instructions by pipe"]
        lines += [f"  {pipe:<10}{count:>14,}" for pipe, count in self.warp_instructions.items()]
        lines.append(f"matrix FLOPs {self.matrix_flops:,.0f}")
        if self.useful_share is not None:
            lines.append(f"useful share of matrix FLOPs {self.useful_share:.1%}")
        lines += [f"{name} {amount:,.0f}" for name, amount in sorted(self.counters.items())]
        for bound in self.bounds:
            lines.append(
                f"{bound.gpu.name}: modelled lower bound {bound.microseconds:.3f} us, bound by "
                f"{bound.binding}"
            )
            ordered = sorted(bound.cycles.items(), key=lambda item: -item[1])
            lines += [f"  {pipe:<10}{cycles:>14,.0f} cycles of an SM" for pipe, cycles in ordered]
        return "\n".join(lines)


def report(result: Result, *, useful_flops: float | None = None) -> Report:
    """Modelled lower bounds from the counters of a launch.

    Args:
        result: of a launch, with profile=True for the memory pipes.
        useful_flops: matrix FLOPs the op needs, to see the share that is not padding or masked.
    """
    counts: dict[str, int] = defaultdict(int)
    flops = {"mma": 0.0, "wgmma": 0.0}
    for inst, count in result.instructions:
        counts[pipe_of(inst)] += count
        if inst.op in flops:
            flops[inst.op] += result.flops.get(inst.line, 0) * count
    total = sum(flops.values())
    share = useful_flops / total if useful_flops is not None and total else None
    bounds = [_bound(gpu, counts, flops, result) for gpu in (A100, H100)]
    return Report(dict(counts), total, share, dict(result.counters), bounds)


def _bound(gpu: Gpu, counts: dict[str, int], flops: dict[str, float], result: Result) -> Bound:
    used = min(gpu.num_sms, result.num_ctas)
    c = result.counters
    own = "wgmma" if gpu is H100 else "mma"
    cycles = {
        "issue": sum(counts.values()) / 4,
        **{
            pipe: counts.get(pipe, 0) * 32 / getattr(gpu, pipe)
            for pipe in ("fp32", "fp64", "integer", "special", "memory")
        },
        "tensor": flops[own] / gpu.tensor_flops
        + (flops["mma"] / gpu.tensor_flops / gpu.mma_share if own == "wgmma" else 0),
        "shared": sum(c.get(f"shared passes, {kind}", 0) for kind in ("load", "store", "copy")),
    }
    cycles = {pipe: amount / used for pipe, amount in cycles.items()}
    sectors = sum(amount for name, amount in c.items() if name.startswith("global sectors"))
    dram = sum(c.get(f"touched bytes, {kind}", 0) for kind in ("load", "store"))
    cycles["l2"] = sectors * BYTES_PER_SECTOR / gpu.l2_bytes
    cycles["dram"] = dram / gpu.dram_gb_s * gpu.clock_ghz
    return Bound(gpu, cycles)
