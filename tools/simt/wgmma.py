"""wgmma: matrix products of four warps, asynchronous in their operands and their accumulators.

The products are computed at issue; the accumulators hold NaN until wgmma.wait_group. Shared memory
counts as read by the warpgroup's own actor until then.
Source: PTX ISA manual, section 9.7.15; descriptors as CUTLASS comments them in
mma_traits_sm90_gmma.hpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.simt.bulk import swizzled
from tools.simt.core import Batch, Mask, Run, binds
from tools.simt.matrix import Warps, items_of, rows_of_a
from tools.simt.numbers import from_bf16
from tools.simt.program import TYPE_BYTES, Imm, Inst, Vec

IN_FLIGHT = np.uint32(0x7FFFFFFF)  # NaN
OPEN = 1 << 30


@dataclass(frozen=True)
class Layout:
    """How a descriptor lays a tile out, but for where it begins."""

    leading: int  # bytes
    stride: int  # bytes
    swizzle: int  # bytes

    @classmethod
    def of(cls, descriptor: int) -> Layout:
        """The fields of a descriptor."""
        swizzle = {0: 0, 1: 128, 2: 64, 3: 32}[descriptor >> 62]
        return cls((descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4, swizzle)

    def places(self, rows: int, depth: int, size: int, transposed: bool) -> np.ndarray:
        """Byte offsets [rows, depth] of elements; rows run along M or N, depth along K."""
        row, k = np.arange(rows)[:, None], np.arange(depth)[None] * 1
        span = self.swizzle
        if not transposed:
            at = k * size
            if span:
                return row % 8 * span + row // 8 * self.stride + at
            return row % 8 * 16 + row // 8 * self.stride + at // 16 * self.leading + at % 16
        at = row * size
        if span:
            return at % span + at // span * self.leading + k % 8 * span + k // 8 * self.stride
        return at % 16 + at // 16 * self.stride + k % 8 * 16 + k // 8 * self.leading


@dataclass
class Accumulator:
    """Results on their way to registers, of every warpgroup of the batch."""

    registers: list[np.ndarray]
    values: np.ndarray  # [groups, 64, N]
    group: np.ndarray  # which commit they belong to; -1: nothing is on its way
    inst: Inst  # the last that adds to them


class Wgmma:
    """The asynchronous products of a batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.num = batch.num_lanes // 128
        self.accumulators: dict[tuple[str, ...], Accumulator] = {}
        self.operands: list[tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]] = []
        self.committed = np.zeros(self.num, np.int64)
        self.epochs: list[list[int]] = [[] for _ in range(self.num)]  # of every committed group
        self.issued = np.zeros(self.num, np.int64)
        self.fenced = np.zeros(self.num, bool)
        self.watched: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # register, value at the fence
        batch.on_reset.append(self.reset)
        batch.on_exit.append(self.check_exit)

    def reset(self) -> None:
        """Nothing on its way."""
        for accumulator in self.accumulators.values():
            accumulator.group[:] = -1
        self.operands.clear()
        self.committed[:] = 0
        self.issued[:] = 0
        self.epochs = [[] for _ in range(self.num)]
        self.fenced[:] = False

    def groups(self, m: Mask, inst: Inst) -> np.ndarray:
        """The warpgroups that execute, whole ones."""
        self.batch.inst = inst
        if m is True:
            return np.arange(self.num)
        rows = m.reshape(-1, 128)
        found = np.flatnonzero(rows.any(axis=1))
        if self.batch.checks.divergence and not rows[found].all():
            first = int(np.flatnonzero(m)[0])
            self.batch.fault("divergence", "only part of a warpgroup is here", first)
        return found

    def place(self, group: int) -> tuple[int, int]:
        """CTA and number within it of a warpgroup."""
        return divmod(int(group), self.batch.num_warps // 4)

    def watch(self, registers: list[np.ndarray]) -> None:
        """Registers that a wgmma touches: changes must be fenced."""
        for register in registers:
            self.watched[id(register)] = (register, register.copy())

    def fence(self, m: Mask) -> None:
        """wgmma.fence."""
        for register, kept in self.watched.values():
            np.copyto(kept, register, where=m)

    def check_fenced(self, groups: np.ndarray, registers: list[np.ndarray], lanes: Any) -> None:
        """Refuse registers that were written since the last fence."""
        if not self.batch.checks.wgmma:
            return
        if not self.fenced[groups].all():
            text = "the first wgmma without a wgmma.fence before it"
            self.batch.fault("wgmma", text, int(groups[0]) * 128)
        for register in registers:
            kept = self.watched[id(register)][1]
            if (kept.reshape(-1, 128)[lanes] != register.reshape(-1, 128)[lanes]).any():
                text = "a register of wgmma was written with no wgmma.fence between"
                self.batch.fault("wgmma", text, int(groups[0]) * 128)

    def commit(self, groups: np.ndarray) -> None:
        """wgmma.commit_group."""
        for accumulator in self.accumulators.values():
            mine = np.isin(np.arange(self.num), groups) & (accumulator.group == OPEN)
            accumulator.group[mine] = self.committed[mine]
        for group in groups:
            self.epochs[group].append(int(self.issued[group]))
        self.committed[groups] += 1

    def wait(self, groups: np.ndarray, newest: int) -> None:
        """wgmma.wait_group: results reach their registers, shared memory is free."""
        limit = self.committed - newest
        chosen = np.isin(np.arange(self.num), groups)
        for accumulator in self.accumulators.values():
            done = chosen & (accumulator.group >= 0) & (accumulator.group < limit)
            if done.any():
                self.deliver(accumulator, np.flatnonzero(done))
        self.check_operands(groups)
        clocks = self.batch.clocks
        for group in groups:
            count = int(limit[group])
            if count <= 0:
                continue
            cta, number = self.place(group)
            actor = clocks.num_warps + number
            for warp in range(4 * number, 4 * number + 4):
                clocks.completed(cta, warp, actor, self.epochs[group][count - 1])

    def deliver(self, accumulator: Accumulator, groups: np.ndarray) -> None:
        """Write results to registers."""
        bits = fragments(accumulator.values[groups])
        for number, register in enumerate(accumulator.registers):
            table = register.reshape(-1, 128)
            if self.batch.checks.wgmma and (table[groups] != IN_FLIGHT).any():
                text = "an accumulator was written with its wgmma in flight"
                self.batch.fault("wgmma", text, int(groups[0]) * 128)
            table[groups] = bits[number]
            self.watched[id(register)][1].reshape(-1, 128)[groups] = bits[number]
        accumulator.group[groups] = -1

    def check_operands(self, groups: np.ndarray) -> None:
        """Refuse changes of A's registers while a wgmma may still read them."""
        left = []
        for mine, registers, values in self.operands:
            if not np.isin(mine, groups).any():
                left.append((mine, registers, values))
            elif self.batch.checks.wgmma:
                for register, value in zip(registers, values, strict=True):
                    if (register.reshape(-1, 128)[mine] != value).any():
                        text = "A's registers were written with a wgmma in flight"
                        self.batch.fault("wgmma", text, int(mine[0]) * 128)
        self.operands = left

    def check_exit(self, m: np.ndarray) -> None:
        """Refuse to leave with products on their way."""
        if not self.batch.checks.pending:
            return
        for accumulator in self.accumulators.values():
            going = (accumulator.group >= 0) & m.reshape(-1, 128).any(axis=1)
            if going.any():
                self.batch.inst = accumulator.inst
                lane = int(np.flatnonzero(going)[0]) * 128
                self.batch.fault("pending", "left the kernel with a wgmma in flight", lane)


def fragments(tile: np.ndarray) -> np.ndarray:
    """Accumulators [groups, 64, N] -> register bits [N / 2, groups, 128]."""
    groups, _, columns = tile.shape
    parts = tile.reshape(groups, 4, 2, 8, columns // 8, 4, 2)  # warp, rb, g, j, t, h
    order = parts.transpose(4, 2, 6, 0, 1, 3, 5)  # j, rb, h, group, warp, g, t
    return np.ascontiguousarray(order).view(np.uint32).reshape(columns // 2, groups, 128)


def tile(registers: list[np.ndarray], groups: np.ndarray) -> np.ndarray:
    """The inverse: the registers of some groups -> [groups, 64, N]."""
    table = np.stack([register.reshape(-1, 128)[groups] for register in registers])
    columns = 2 * len(registers)
    parts = table.view(np.float32).reshape(columns // 8, 2, 2, len(groups), 4, 8, 4)
    order = parts.transpose(3, 4, 1, 5, 0, 6, 2)
    return np.ascontiguousarray(order).reshape(len(groups), 64, columns)


class Operand:
    """A tile of shared memory that a descriptor names."""

    def __init__(self, batch: Batch, descriptor: Any, rows: int, depth: int, kind: str) -> None:
        self.batch, self.descriptor, self.kind = batch, descriptor, kind
        self.rows, self.depth = rows, depth
        self.size = TYPE_BYTES[kind]

    def read(self, groups: np.ndarray, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
        """Values [groups, rows, depth], and the flat offsets of what they are in 16-byte chunks."""
        batch, shared = self.batch, self.batch.shared
        first = groups * 128
        words = np.broadcast_to(self.descriptor, batch.num_lanes)[first]
        if (words >> np.uint64(49) & np.uint64(7)).any():
            batch.fault("unsupported", "a descriptor with a base offset", int(first[0]))
        layouts = {Layout.of(int(word)) for word in words}
        if len(layouts) != 1:
            text = "warpgroups of a batch whose tiles are laid out differently; use fewer lanes"
            batch.fault("unsupported", text, int(first[0]))
        layout = layouts.pop()
        begin = (words & np.uint64(0x3FFF)).astype(np.int64) << 4
        at = begin[:, None, None] + layout.places(self.rows, self.depth, self.size, transposed)
        at = swizzled(at, layout.swizzle)
        outside = (at < shared.base) | (at + self.size > shared.base + shared.num_bytes)
        if outside.any():
            batch.fault("bounds", "a wgmma descriptor reaches outside shared memory", int(first[0]))
        flat = at + shared.cta_base[first][:, None, None]
        bits = shared.view(self.size)[flat // self.size]
        step = 16 // self.size  # elements of a chunk, along the contiguous dimension
        chunks = flat[:, ::step] if transposed else flat[:, :, ::step]
        if self.kind == "bf16":
            return from_bf16(bits), chunks
        if self.kind == "tf32":
            return (bits & np.uint32(0xFFFFE000)).view(np.float32), chunks
        return bits.view(np.float16).astype(np.float32), chunks


@binds("wgmma")
def _wgmma(inst: Inst, batch: Batch) -> Run:
    if batch.num_warps % 4:
        raise ValueError("wgmma in a CTA of no whole warpgroups")
    state, kind = batch.part(Wgmma), inst.mods[0]
    if kind == "fence":

        def fence(m: Mask) -> None:
            state.fenced[state.groups(m, inst)] = True
            state.fence(m)

        return fence
    if kind == "commit_group":
        return lambda m: state.commit(state.groups(m, inst))
    if kind == "wait_group":
        assert isinstance(inst.operands[0], Imm)
        newest = inst.operands[0].bits
        return lambda m: state.wait(state.groups(m, inst), newest)
    return _mma_async(inst, batch, state)


def _mma_async(inst: Inst, batch: Batch, state: Wgmma) -> Run:
    shape = next(mod for mod in inst.mods if mod.startswith("m64n"))
    columns, depth = (int(part) for part in shape[4:].split("k"))
    d_kind, kind, other = inst.types[-3:]
    if d_kind != "f32" or kind != other or kind not in ("bf16", "f16", "tf32"):
        raise ValueError("a wgmma type")
    d_operand, a_operand, b_operand, scale, *flags = inst.operands
    registers = [batch.register(item) for item in items_of(d_operand)]
    names = tuple(item.name for item in items_of(d_operand))
    from_registers = isinstance(a_operand, Vec)
    a_registers = [batch.register(r) for r in items_of(a_operand)] if from_registers else []
    numbers = [flag.bits for flag in flags]
    signs, transposes = numbers[:2], [bool(n) for n in numbers[2:]]
    transpose_a = transposes[0] if len(transposes) == 2 else False
    transpose_b = transposes[-1] if transposes else False
    a = None if from_registers else Operand(batch, batch.source(a_operand, "u64"), 64, depth, kind)
    b = Operand(batch, batch.source(b_operand, "u64"), columns, depth, kind)
    keeps = np.bool_(scale.bits != 0) if isinstance(scale, Imm) else batch.source(scale, "pred")
    accumulator = state.accumulators.setdefault(
        names,
        Accumulator(
            registers,
            np.zeros((state.num, 64, columns), np.float32),
            np.full(state.num, -1, np.int64),
            inst,
        ),
    )
    state.watch([*registers, *a_registers])
    batch.flops[inst.line] = 2 * 16 * columns * depth  # a warp's share

    def run(m: Mask) -> None:
        groups = state.groups(m, inst)
        landed = groups[accumulator.group[groups] < 0]
        keep = np.broadcast_to(keeps, batch.num_lanes)[groups * 128]
        state.check_fenced(groups, a_registers, groups)
        if len(landed):
            state.check_fenced(landed, registers, landed)
            accumulator.values[landed] = tile(registers, landed)
        if a is None:
            warps = Warps(batch, True if m is True else m)
            left = rows_of_a([warps.take(r) for r in a_registers], kind).reshape(-1, 64, depth)
            values = [r.reshape(-1, 128)[groups].copy() for r in a_registers]
            state.operands.append((groups, a_registers, values))
            of_a = None
        else:
            left, of_a = a.read(groups, transpose_a)
        right, of_b = b.read(groups, transpose_b)
        _note_reads(state, groups, of_a, of_b)
        product = np.matmul(left, right.transpose(0, 2, 1)) * np.float32(signs[0] * signs[1])
        before = np.where(keep[:, None, None], accumulator.values[groups], np.float32(0))
        accumulator.values[groups] = product + before
        accumulator.group[groups], accumulator.inst = OPEN, inst
        for register in registers:
            register.reshape(-1, 128)[groups] = IN_FLIGHT

    return run


def _note_reads(state: Wgmma, groups: np.ndarray, of_a: Any, of_b: np.ndarray) -> None:
    """Check and note the warps' reads: all of B, and of A each warp's own 16 rows.

    Chunks are flat offsets of 16 bytes, [groups, rows, depth] in some unit.
    """
    batch = state.batch
    shadow, clocks = batch.shared.shadow, batch.clocks
    ctas, inside = np.divmod(groups, batch.num_warps // 4)
    actors = clocks.num_warps + inside
    epochs = [clocks.asynchronous(int(c), int(a)) for c, a in zip(ctas, actors, strict=True)]
    state.issued[groups] = epochs
    if not shadow:
        return
    count = len(groups)
    chunks = np.repeat(of_b.reshape(count, 1, -1), 4, axis=1)  # [groups, warps, chunks]
    if of_a is not None:
        chunks = np.concatenate([chunks, of_a.reshape(count, 4, -1)], axis=2)
    lanes = (groups * 128)[:, None] + np.arange(0, 128, 32)
    each = chunks.shape[2]
    at = shadow.granules(chunks.reshape(-1), 16)
    who, when = np.repeat(actors, 4 * each), np.repeat(epochs, 4 * each)
    shadow.async_read(np.repeat(lanes.reshape(-1), each), at, who[:, None], when[:, None])
