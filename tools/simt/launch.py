"""Run a kernel: parameters in, arrays out, counters back."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.simt import (  # noqa: F401  (they register their instructions)
    access,
    bits,
    bulk,
    control,
    convert,
    copies,
    floats,
    integers,
    matrix,
    mbarrier,
    wgmma,
)
from tools.simt.core import Batch, Traffic
from tools.simt.faults import Checks
from tools.simt.global_memory import GlobalMemory, GlobalRaces
from tools.simt.memory import Device, Output
from tools.simt.parse import parse
from tools.simt.program import Inst, Kernel, Module, Variable
from tools.simt.shared import BASE

LANES_PER_BATCH = 1024  # more gains nothing: NumPy's calls are then long enough
# What CUDA launches at most along x, y and z: CTAs of a grid, threads of a CTA.
MOST = {"grid": (2**31 - 1, 65535, 65535), "block": (1024, 1024, 64)}
MOST_THREADS = 1024  # of a CTA


@dataclass
class Result:
    """What a launch did: instructions by text of their opcode, counters, and the kernel."""

    kernel: Kernel
    instructions: list[tuple[Inst, int]]  # each with the number of warps that executed it
    counters: dict[str, float] = field(default_factory=dict)
    flops: dict[int, int] = field(default_factory=dict)  # PTX line -> matrix FLOPs of a warp
    num_ctas: int = 1
    dynamic_shared_bytes: int = 0  # of a CTA
    traffic: list[Traffic] = field(default_factory=list)  # with profile, in order

    @property
    def num_warp_instructions(self) -> int:
        """Warp instructions executed, predicated-off ones included."""
        return sum(count for _, count in self.instructions)


def three(size: int | Sequence[int]) -> tuple[int, int, int]:
    """A grid or block as x, y, z."""
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return (*sizes, 1, 1)[:3]  # type: ignore[return-value]


def check_sizes(grid: tuple[int, int, int], block: tuple[int, int, int]) -> None:
    """Refuse what CUDA answers with an error, a grid of no CTAs too."""
    for name, sizes in (("grid", grid), ("block", block)):
        if any(not 1 <= size <= most for size, most in zip(sizes, MOST[name], strict=True)):
            raise ValueError(f"launch: {name} must be from 1 to {MOST[name]}, got {sizes}")
    if math.prod(block) > MOST_THREADS:
        raise ValueError(f"launch: block must have at most {MOST_THREADS} threads, got {block}")


def launch(
    ptx: str,
    kernel: str,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    args: Sequence[Any],
    shared_bytes: int = 0,
    *,
    device: Device | None = None,
    checks: Checks | None = None,
    schedule: str | int = "lockstep",
    profile: bool = False,
    lanes: int = LANES_PER_BATCH,
    max_blocks: int = 20_000_000,
) -> Result:
    """Execute a kernel on the CPU.

    Args:
        ptx: the text of a PTX file.
        kernel: the name of an entry, or a part of it that no other has.
        grid: CTAs along x, y, z.
        block: threads along x, y, z.
        args: one per parameter: arrays and CPU tensors (updated in place), numbers, ctypes
            structures or bytes, tensor maps. Missing ones at the end are zeros.
        shared_bytes: dynamic shared memory, in bytes.
        device: where the arrays lie, if structures hold pointers (`device.pointer(array)`).
        checks: which checks are made, all by default.
        schedule: "lockstep", or a seed: then one random warp at a time runs.
        profile: count sectors and shared-memory passes too.
        lanes: lanes executed at once, about.
        max_blocks: basic blocks after which a batch of CTAs counts as one that never ends.
    Returns:
        Counters. Arrays hold what the kernel wrote.
    Raises:
        Fault: the kernel did something wrong.
        ValueError: CUDA launches no such grid or block.
    """
    module = parse(ptx)
    entry = module.kernel(kernel)
    device = device or Device()
    checks = checks or Checks()
    grid, block = three(grid), three(block)
    check_sizes(grid, block)
    num_ctas = grid[0] * grid[1] * grid[2]
    symbols, total_shared = place_variables(module, entry, device, shared_bytes)
    pack_params(entry, args, device, symbols)
    device.refresh()
    threads = -(-block[0] * block[1] * block[2] // 32) * 32
    rng = None if schedule == "lockstep" else np.random.default_rng(int(schedule))
    per_batch = min(num_ctas, max(1, lanes // threads))
    batch = Batch(
        entry, device, grid, block, per_batch, symbols, total_shared, checks, profile, wire
    )
    batch.global_memory.races = (
        GlobalRaces(len(device.bytes), entry) if checks.global_race else None
    )
    batch.max_blocks = max_blocks
    for first in range(0, num_ctas, per_batch):
        batch.begin(first, min(per_batch, num_ctas - first))
        batch.run(rng)
    device.write_back()
    executed = [(inst, block.count) for block in batch.blocks for inst in block.insts]
    batch.global_memory.count_touched()
    return Result(
        entry, executed, batch.counters, batch.flops, num_ctas, shared_bytes, batch.traffic
    )


def wire(batch: Batch) -> None:
    """Give a batch its view of global memory, before instructions are bound."""
    batch.global_memory = GlobalMemory(batch, None)


def place_variables(
    module: Module, kernel: Kernel, device: Device, dynamic_bytes: int
) -> tuple[dict[str, int], int]:
    """Addresses of all variables, and the bytes of shared memory."""
    symbols: dict[str, int] = {}
    offsets = {"shared": BASE, "local": 0}
    dynamic: list[Variable] = []
    for variable in [*module.variables, *kernel.variables]:
        if variable.space == "shared" and (variable.extern or not variable.num_bytes):
            dynamic.append(variable)
        elif variable.space in offsets:
            begin = -(-offsets[variable.space] // variable.align) * variable.align
            symbols[variable.name] = begin
            offsets[variable.space] = begin + variable.num_bytes
        elif variable.space in ("global", "const"):
            data = variable.data.ljust(variable.num_bytes, b"\0")
            symbols[variable.name] = device.store(data, variable.name)
    for variable in dynamic:
        align = max(variable.align, 16)
        symbols[variable.name] = -(-offsets["shared"] // align) * align
    begin = max([offsets["shared"], *(symbols[v.name] for v in dynamic)])
    symbols["local bytes"] = offsets["local"]
    return symbols, begin + dynamic_bytes - BASE


def pack_params(
    kernel: Kernel, args: Sequence[Any], device: Device, symbols: dict[str, int]
) -> None:
    """Lay the arguments out as the kernel's parameters, in memory of their own."""
    if len(args) > len(kernel.params):
        raise ValueError(f"simt: {len(kernel.params)} parameters, {len(args)} arguments")
    size = max((p.offset + p.num_bytes for p in kernel.params), default=0)
    blob = bytearray(size)
    for param, arg in zip(kernel.params, args, strict=False):
        data = pack(param, arg, device)
        if len(data) > param.num_bytes:
            raise ValueError(f"simt: {param.name} has {param.num_bytes} bytes, got {len(data)}")
        blob[param.offset : param.offset + len(data)] = data
    base = device.store(bytes(blob), "parameters", 128)
    for param in kernel.params:
        symbols[param.name] = base + param.offset


def pack(param: Variable, arg: Any, device: Device) -> bytes:
    """The bytes of one argument."""
    if isinstance(arg, ctypes.Structure):
        return bytes(arg)
    if isinstance(arg, bytes):
        return arg
    if hasattr(arg, "encode"):  # a tensor map
        return arg.encode(device)
    if isinstance(arg, (np.ndarray, Output)) or hasattr(arg, "data_ptr"):
        return device.pointer(arg, param.name).to_bytes(8, "little")
    kind = {"f32": np.float32, "f64": np.float64}.get(param.type)
    if kind:
        return kind(arg).tobytes()
    return (int(arg) & (1 << 8 * param.num_bytes) - 1).to_bytes(param.num_bytes, "little")
