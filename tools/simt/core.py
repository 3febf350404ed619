"""A batch of CTAs run as one: a NumPy array per register, basic blocks, and a scheduler.

Every instruction becomes a closure over views of its registers; it is called with a mask of lanes,
True for all of them. The block with the lowest program counter among the lanes that may run is
next, so lanes that parted meet again. Instructions that need other lanes (`.sync`) begin a block
that is entered only when those lanes have arrived.

Source: lanes as NumPy arrays and the lowest counter first are tinygrad's mock GPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tools.simt.clocks import Clocks
from tools.simt.faults import Checks, Fault
from tools.simt.memory import Device
from tools.simt.numbers import UINT, dtype_of
from tools.simt.program import TYPE_BYTES, Imm, Inst, Kernel, Not, Operand, Reg, Symbol
from tools.simt.shared import Shared

Mask = Any  # True, or a bool array over the lanes
Run = Callable[[Mask], Any]
BINDERS: dict[str, Callable[[Inst, Batch], Run]] = {}
ENDS_BLOCK = {"bra", "brx", "ret", "exit", "bar", "barrier"}
FULL = Imm(0xFFFFFFFF)
POISON = 0xFFFFFFFFFFFFFFFF  # NaN: registers before they are written


def binds(*ops: str) -> Callable[[Callable[[Inst, Batch], Run]], Callable[[Inst, Batch], Run]]:
    """Register the maker of closures of some opcodes."""

    def register(binder: Callable[[Inst, Batch], Run]) -> Callable[[Inst, Batch], Run]:
        BINDERS.update(dict.fromkeys(ops, binder))
        return binder

    return register


def ends_block(inst: Inst) -> bool:
    """Whether lanes may go different ways, or stop, at an instruction."""
    waits = inst.op == "mbarrier" and inst.mods[0] in ("try_wait", "test_wait")
    return inst.op in ENDS_BLOCK or waits


def needed_lanes(inst: Inst) -> Operand | str:
    """What must have arrived before an instruction: "warp", "group", a mask operand, or None."""
    if inst.op == "wgmma":
        return "group"
    if (
        inst.op in ("shfl", "vote", "match", "redux") and "sync" in inst.mods
    ) or inst.op == "elect":
        mask = inst.operands[-1]
    elif inst.op == "bar" and inst.mods[0] == "warp":
        mask = inst.operands[0]
    else:
        aligned = "aligned" in inst.mods or inst.op == "bar"
        return "warp" if aligned else None
    return "warp" if isinstance(mask, Imm) and mask.bits & FULL.bits == FULL.bits else mask


@dataclass
class Block:
    """Instructions that the same lanes execute one after another."""

    first: int
    needs: Operand | str = None
    insts: list[Inst] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    end: Run | None = None
    next: int = 0
    count: int = 0  # warps that executed it
    mask: np.ndarray | None = None  # the values of a mask operand


def split_blocks(kernel: Kernel) -> list[Block]:
    """The kernel's basic blocks, in order."""
    leaders = {0, *kernel.labels.values()}
    blocks: list[Block] = []
    for at, inst in enumerate(kernel.insts):
        needs = needed_lanes(inst)
        last = blocks[-1] if blocks else None
        covered = needs is None or (last and (last.needs in (needs, "group")))
        if isinstance(needs, Reg):
            covered = False
        if at in leaders or not covered or last is None or ends_block(last.insts[-1]):
            blocks.append(Block(at, needs))
        elif inst.op == "mbarrier" and ends_block(inst):  # lanes come back to it
            blocks.append(Block(at))
        blocks[-1].insts.append(inst)
    for number, block in enumerate(blocks):
        block.next = number + 1
    return blocks


class Traffic(NamedTuple):
    """Bytes that move from or to global memory, or are waited for."""

    kind: str  # moved or awaited
    passes: float  # of loads and stores of shared memory before
    moved_bytes: int  # by all so far; of what is awaited, when that began to move


class Batch:
    """Some CTAs of a grid, executed together."""

    def __init__(
        self,
        kernel: Kernel,
        device: Device,
        grid: tuple[int, int, int],
        threads: tuple[int, int, int],
        num_ctas: int,
        symbols: dict[str, int],
        shared_bytes: int,
        checks: Checks,
        profile: bool,
        wire: Callable[[Batch], None],
    ) -> None:
        self.kernel, self.device, self.checks, self.profile = kernel, device, checks, profile
        self.grid, self.threads, self.num_ctas, self.symbols = grid, threads, num_ctas, symbols
        self.num_threads = threads[0] * threads[1] * threads[2]
        self.num_warps = -(-self.num_threads // 32)
        per_cta = self.num_warps * 32
        self.num_lanes = num_ctas * per_cta
        self.all = np.arange(self.num_lanes)
        self.lane = self.all % 32
        self.thread = self.all % per_cta
        self.warp = self.thread // 32
        self.cta = self.all // per_cta
        self.exists = self.thread < self.num_threads
        self.regs: dict[str, np.ndarray] = {}
        self.clocks = Clocks(num_ctas, self.num_warps)
        actors = self.clocks.num_actors
        self.known = self.clocks.known.reshape(-1)
        self.clock_row = (self.cta * actors + self.warp) * actors
        self.who = (self.warp << 6 | self.lane).astype(np.int32)
        self.shared = Shared(self, shared_bytes)
        self.parts: dict[str, Any] = {}  # state of instruction families: copies, mbarriers, ...
        self.on_reset: list[Callable[[], None]] = []
        self.on_exit: list[Callable[[Mask], None]] = []
        self.on_done: list[Callable[[], None]] = []
        self.counters: dict[str, float] = {}
        self.traffic: list[Traffic] = []
        self.moved_bytes = 0
        self.flops: dict[int, int] = {}  # PTX line -> matrix FLOPs of a warp's instruction
        self.carry = np.zeros(self.num_lanes, bool)
        self.special = self._special_registers()
        self.blocks = split_blocks(kernel)
        self.block_at = {block.first: number for number, block in enumerate(self.blocks)}
        self.block_at[len(kernel.insts)] = len(self.blocks)
        self.inst: Inst | None = None
        self.max_blocks = 0  # that a batch may run
        self.global_memory: Any = None
        wire(self)
        self._bind()

    def _special_registers(self) -> dict[str, Any]:
        x, y, _ = self.threads
        u32 = np.uint32
        values = {
            "%tid.x": (self.thread % x).astype(u32),
            "%tid.y": (self.thread // x % y).astype(u32),
            "%tid.z": (self.thread // (x * y)).astype(u32),
            "%laneid": self.lane.astype(u32),
            "%warpid": self.warp.astype(u32),
            "%nwarpid": u32(self.num_warps),
            "%lanemask_eq": (1 << self.lane).astype(u32),
            "%lanemask_lt": ((1 << self.lane) - 1).astype(u32),
            "%lanemask_le": ((2 << self.lane) - 1).astype(u32),
            "%lanemask_ge": (0x100000000 - (1 << self.lane)).astype(u32),
            "%lanemask_gt": (0x100000000 - (2 << self.lane)).astype(u32),
            "%dynamic_smem_size": u32(self.shared.num_bytes),
            "%total_smem_size": u32(self.shared.num_bytes),
            **{"%smid": u32(0), "%nsmid": u32(1), "%clock": u32(0), "%clock64": np.uint64(0)},
            **{"%globaltimer": np.uint64(0), "%gridid": np.uint64(1), "WARP_SZ": u32(32)},
            **{"%is_explicit_cluster": np.False_, "%cluster_ctarank": u32(0)},
            "%cluster_nctarank": u32(1),
        }
        for axis, name in enumerate("xyz"):
            values[f"%ntid.{name}"] = u32(self.threads[axis])
            values[f"%nctaid.{name}"] = u32(self.grid[axis])
            values[f"%nclusterid.{name}"] = u32(self.grid[axis])
            values[f"%ctaid.{name}"] = np.zeros(self.num_lanes, u32)
            values[f"%clusterid.{name}"] = values[f"%ctaid.{name}"]
            values[f"%cluster_ctaid.{name}"] = u32(0)
            values[f"%cluster_nctaid.{name}"] = u32(1)
        return values

    # Operands.

    def register(self, reg: Reg) -> np.ndarray:
        """The array of a register, as unsigned integers or bools."""
        if reg.name not in self.regs:
            kind = bool if reg.type == "pred" else UINT[TYPE_BYTES[reg.type]]
            self.regs[reg.name] = np.zeros(self.num_lanes, kind)
        return self.regs[reg.name]

    def source(self, operand: Operand, type_name: str) -> Any:
        """An operand as an array over the lanes or a scalar; wide registers give their low part."""
        dtype = dtype_of(type_name)
        if isinstance(operand, Reg):
            array = self.register(operand)
            if dtype.kind == "b" or array.dtype.kind == "b":
                return array
            if array.itemsize < dtype.itemsize:
                raise Fault("unsupported", f"{operand.name} is narrower than {type_name}")
            view = array.view(dtype)
            return view[:: array.itemsize // dtype.itemsize]
        if isinstance(operand, Imm):
            return literal(operand, type_name)
        if isinstance(operand, Symbol):
            value = self.special.get(operand.name)
            if value is None:
                if operand.name not in self.symbols:
                    raise Fault("unsupported", f"unknown name {operand.name}")
                bits = self.symbols[operand.name] + operand.offset
                return np.array(bits, np.uint64).astype(dtype)[()]
            return value if value.dtype == bool else value.astype(dtype_of(type_name), copy=False)
        raise Fault("unsupported", f"operand {operand}")

    def predicate(self, operand: Operand) -> Callable[[], Any]:
        """A predicate that may be negated, read when called."""
        if isinstance(operand, Not):
            array = self.source(operand.reg, "pred")
            return lambda: ~array
        array = self.source(operand, "pred")
        return lambda: array

    def dest(self, operand: Operand, type_name: str) -> np.ndarray:
        """The array to write a result of a type to; the sink gets a fresh one."""
        if operand is None:
            return np.zeros(self.num_lanes, dtype_of(type_name))
        assert isinstance(operand, Reg)
        array = self.register(operand)
        dtype = dtype_of(type_name)
        if array.dtype == bool:
            return array
        if array.itemsize != dtype.itemsize:  # the value is extended to the whole register
            dtype = np.dtype(f"{'i' if type_name[0] == 's' else 'u'}{array.itemsize}")
        return array.view(dtype)

    def index(self, m: Mask) -> np.ndarray:
        """Numbers of the lanes of a mask."""
        return self.all if m is True else np.flatnonzero(m)

    def own_epoch(self, lanes: np.ndarray) -> np.ndarray:
        """The last finished epoch of the lanes' warps."""
        return self.known.take(self.clock_row[lanes] + self.warp[lanes])

    def part(self, kind: type) -> Any:
        """The batch's only object of a class, made when first asked for."""
        if kind.__name__ not in self.parts:
            self.parts[kind.__name__] = kind(self)
        return self.parts[kind.__name__]

    def count(self, name: str, amount: float) -> None:
        """Add to a counter."""
        self.counters[name] = self.counters.get(name, 0) + amount

    def move(self, num_bytes: int) -> int:
        """Note bytes that begin to move from or to global memory; all so far, these included."""
        self.moved_bytes += num_bytes
        self._note("moved", self.moved_bytes)
        return self.moved_bytes

    def arrived(self, moved_bytes: int) -> None:
        """Note that lanes have waited for what `move` said this of."""
        self._note("awaited", moved_bytes)

    def _note(self, kind: str, moved_bytes: int) -> None:
        if self.profile:
            passes = sum(self.counters.get(f"shared passes, {k}", 0) for k in ("load", "store"))
            self.traffic.append(Traffic(kind, passes, moved_bytes))

    def fault(self, kind: str, text: str, lane: int | None = None) -> None:
        """Raise a fault of the current instruction."""
        raise Fault(kind, text, self.inst, "" if lane is None else self.name_lane(lane))

    def name_lane(self, lane: int) -> str:
        """A lane in words."""
        cta = [int(self.special[f"%ctaid.{axis}"][lane]) for axis in "xyz"]
        return (
            f"CTA {tuple(cta)}, warp {self.warp[lane]}, lane {self.lane[lane]} "
            f"(thread {self.thread[lane]})"
        )

    def spend(self) -> None:
        """Count a block; a batch that runs too many of them will never end."""
        self.blocks_left -= 1
        if self.blocks_left < 0:
            self.inst = None
            self.fault("deadlock", "still running after the blocks that launch allows")

    # Binding.

    def _bind(self) -> None:
        for block in self.blocks:
            self.binding = block
            if isinstance(block.needs, Reg):
                block.mask = self.source(block.needs, "b32")
            elif isinstance(block.needs, Imm):
                block.mask = np.full(self.num_lanes, block.needs.bits, np.uint32)
            for inst in block.insts:
                run = self._closure(inst)
                if ends_block(inst):
                    block.end = run
                else:
                    block.runs.append(run)

    def _closure(self, inst: Inst) -> Run:
        try:
            run = BINDERS[inst.op](inst, self)
        except (KeyError, Fault, AssertionError, IndexError, ValueError) as error:
            return unsupported(inst, error)
        if inst.guard is None or ends_block(inst):
            return run
        reg, negated = inst.guard
        return guarded(run, self.register(reg), negated, self.num_lanes)

    # Running.

    def begin(self, first: int, count: int) -> None:
        """Get ready for CTAs `first` to `first + count` of the grid."""
        x, y, _ = self.grid
        self.cta_number = first + self.cta
        self.special["%ctaid.x"][:] = self.cta_number % x
        self.special["%ctaid.y"][:] = self.cta_number // x % y
        self.special["%ctaid.z"][:] = self.cta_number // (x * y)
        for array in self.regs.values():
            array.fill(False if array.dtype == bool else POISON & (1 << 8 * array.itemsize) - 1)
        self.clocks.reset()
        self.shared.reset()
        for reset in self.on_reset:
            reset()
        self.live = self.exists & (self.cta < count)
        self.parked = np.zeros(self.num_lanes, bool)
        self.pc = np.zeros(self.num_lanes, np.int32)
        self.blocks_left = self.max_blocks
        self.events = 0  # what may let waiting lanes go on

    def run(self, schedule: np.random.Generator | None) -> None:
        """Execute until every lane has left."""
        from tools.simt.schedule import run_batch

        with np.errstate(all="ignore"):
            run_batch(self, schedule)
            for done in self.on_done:
                done()


def literal(operand: Imm, type_name: str) -> Any:
    """A literal as a NumPy scalar of a type."""
    dtype = dtype_of(type_name)
    if dtype.kind == "b":
        return np.bool_(operand.bits != 0)
    if operand.kind == "int":
        if dtype.kind == "f":
            return dtype.type(operand.bits)
        bits = operand.bits & (1 << 8 * dtype.itemsize) - 1
        return np.array(bits, np.uint64).astype(UINT[dtype.itemsize]).view(dtype)[()]
    bits = np.array(operand.bits, UINT[4 if operand.kind == "f32" else 8])
    if bits.itemsize == dtype.itemsize:
        return bits.view(dtype)[()]
    return bits.view(np.float32 if operand.kind == "f32" else np.float64).astype(dtype)[()]


def guarded(run: Run, predicate: np.ndarray, negated: bool, num_lanes: int) -> Run:
    """Run under a predicate, and not at all where no lane has it."""

    def with_guard(m: Mask) -> None:
        chosen = np.logical_and(~predicate if negated else predicate, m)
        count = np.count_nonzero(chosen)
        if count:
            run(True if count == num_lanes else chosen)

    return with_guard


def unsupported(inst: Inst, error: Exception) -> Run:
    """An instruction nobody can execute: dead code may hold anything."""

    def refuse(m: Mask) -> None:
        reason = "" if isinstance(error, KeyError) else f" ({error})"
        raise Fault("unsupported", f"instruction not known to simt{reason}", inst)

    return refuse
