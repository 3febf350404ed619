"""Matrix instructions of a warp: ldmatrix, stmatrix, movmatrix and mma.sync.

In fragments g = lane / 4 and t = lane % 4; h is the half of a register. Products are exact in
float32 and added in float32; a tensor core adds in an order and a width that are not documented.
Source: PTX ISA manual, section 9.7.14, "Matrix fragments for mma".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tools.simt.control import whole_warps
from tools.simt.core import Batch, Mask, Run, binds
from tools.simt.numbers import from_bf16, unpack
from tools.simt.program import Inst, Operand, Vec


def items_of(operand: Operand) -> tuple[Operand, ...]:
    """The registers of a vector operand, or the one."""
    return operand.items if isinstance(operand, Vec) else (operand,)


class Warps:
    """Registers as [warps, 32], only those warps that execute."""

    def __init__(self, batch: Batch, m: Mask) -> None:
        self.rows = None if m is True else np.flatnonzero(m.reshape(-1, 32).any(axis=1))
        self.count = batch.num_lanes // 32 if self.rows is None else len(self.rows)

    def take(self, array: np.ndarray) -> np.ndarray:
        """The chosen warps of a register."""
        table = array.reshape(-1, 32)
        return table if self.rows is None else table[self.rows]

    def put(self, array: np.ndarray, values: np.ndarray) -> None:
        """Write the chosen warps of a register."""
        array.reshape(-1, 32)[slice(None) if self.rows is None else self.rows] = values


def spread(words: np.ndarray, kind: str) -> np.ndarray:
    """Registers [..., n] -> the float32 elements that they hold along the last axis."""
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)
    if kind == "bf16":
        return from_bf16(words.view(np.uint16))
    return words.view(np.float16).astype(np.float32)


def rows_of_a(registers: Sequence[np.ndarray], kind: str) -> np.ndarray:
    """A fragments [warps, 32] each -> float32 [warps, 16, K]; register 2 kb + rb, rows g + 8 rb."""
    warps, blocks = len(registers[0]), len(registers) // 2
    a = np.empty((warps, 2, 8, blocks, 4), np.uint32)
    for number, register in enumerate(registers):
        a[:, number % 2, :, number // 2] = register.reshape(warps, 8, 4)
    return spread(a.reshape(warps, 16, 4 * blocks), kind)


def columns_of_b(registers: Sequence[np.ndarray], kind: str) -> np.ndarray:
    """B fragments [warps, 32] each -> float32 [warps, K, 8]; register kb, rows 2 t + h + 8 kb."""
    warps, blocks = len(registers[0]), len(registers)
    b = np.empty((warps, 8, blocks, 4), np.uint32)
    for number, register in enumerate(registers):
        b[:, :, number] = register.reshape(warps, 8, 4)
    return spread(b.reshape(warps, 8, 4 * blocks), kind).transpose(0, 2, 1)


def tile_of_c(registers: Sequence[np.ndarray], kind: str) -> np.ndarray:
    """Accumulators [warps, 32] each -> float32 [warps, 16, 8]; rows g + 8 rb, columns 2 t + h."""
    warps = len(registers[0])
    c = np.empty((warps, 2, 8, 4, 2), np.float32)
    for number, register in enumerate(registers):
        if kind == "f16":
            for half, values in enumerate(unpack(register, "f16")):
                c[:, number, :, :, half] = values.reshape(warps, 8, 4)
        else:
            c[:, number // 2, :, :, number % 2] = register.view(np.float32).reshape(warps, 8, 4)
    return c.reshape(warps, 16, 8)


def registers_of_c(tile: np.ndarray, kind: str) -> list[np.ndarray]:
    """The inverse of tile_of_c: unsigned [warps, 32] each."""
    warps = len(tile)
    c = tile.reshape(warps, 2, 8, 4, 2)
    if kind == "f16":
        packed = np.ascontiguousarray(c.astype(np.float16)).view(np.uint32)
        return [packed[:, rb].reshape(warps, 32) for rb in range(2)]
    bits = c.view(np.uint32)
    return [bits[:, rb, :, :, half].reshape(warps, 32) for rb in range(2) for half in range(2)]


@binds("mma")
def _mma(inst: Inst, batch: Batch) -> Run:
    shape = next(mod for mod in inst.mods if mod[0] == "m" and mod[1].isdigit())
    d_kind, a_kind, b_kind, c_kind = inst.types[-4:]
    sizes = {"tf32": ("m16n8k8", "m16n8k4")}.get(a_kind, ("m16n8k16", "m16n8k8"))
    if a_kind != b_kind or a_kind not in ("f16", "bf16", "tf32") or shape not in sizes:
        raise ValueError("an mma shape or type")
    d, a, b, c = (
        [batch.source(item, "b32") for item in items_of(operand)] for operand in inst.operands
    )
    c = [np.broadcast_to(register, batch.num_lanes) for register in c]  # literals too
    batch.flops[inst.line] = 2 * 16 * 8 * int(shape.rsplit("k", 1)[1])

    def run(m: Mask) -> None:
        whole_warps(batch, inst, m, batch.exists)
        warps = Warps(batch, m)
        left = rows_of_a([warps.take(r) for r in a], a_kind)
        right = columns_of_b([warps.take(r) for r in b], b_kind)
        added = tile_of_c([warps.take(r) for r in c], c_kind)
        result = np.matmul(left, right)
        result += added
        for register, values in zip(d, registers_of_c(result, d_kind), strict=True):
            warps.put(register, values)

    return run


# Matrices of 8 x 8 elements of 16 bits between registers and shared memory.


def num_matrices(inst: Inst) -> int:
    """1, 2 or 4."""
    return next(int(mod[1]) for mod in inst.mods if mod in ("x1", "x2", "x4"))


def row_lanes(batch: Batch, m: Mask, count: int) -> np.ndarray:
    """The lanes that give row addresses: the first 8 `count` of every warp."""
    lanes = batch.index(m)
    return lanes[batch.lane[lanes] < 8 * count]


@binds("ldmatrix")
def _load_matrix(inst: Inst, batch: Batch) -> Run:
    from tools.simt.access import address_of

    if "b8" in inst.mods or "m8n16" in inst.mods:
        raise ValueError("ldmatrix of narrow elements")
    to = [batch.dest(item, "b32") for item in items_of(inst.operands[0])]
    address, count = address_of(batch, inst.operands[1]), num_matrices(inst)
    transposed = "trans" in inst.mods
    shared = batch.shared

    def run(m: Mask) -> None:
        batch.inst = inst
        whole_warps(batch, inst, m, batch.exists)
        warps, lanes = Warps(batch, m), row_lanes(batch, m, count)
        flat = shared.locate(lanes, address(lanes), 16)
        if shared.shadow:
            shared.shadow.read(lanes, shared.shadow.granules(flat, 16), collective=True)
        if batch.profile:
            shared.count_passes("load", lanes, flat, 16)
        rows = shared.view(4, 4).take(flat // 16, axis=0).reshape(warps.count, count, 8, 4)
        if transposed:
            halves = rows.view(np.uint16).transpose(0, 1, 3, 2)
            rows = np.ascontiguousarray(halves).view(np.uint32)
        for number, register in enumerate(to):
            warps.put(register, rows[:, number].reshape(warps.count, 32))

    return run


@binds("stmatrix")
def _store_matrix(inst: Inst, batch: Batch) -> Run:
    from tools.simt.access import address_of

    if "b8" in inst.mods or "m16n8" in inst.mods:
        raise ValueError("stmatrix of narrow elements")
    address, count = address_of(batch, inst.operands[0]), num_matrices(inst)
    values = [batch.source(item, "b32") for item in items_of(inst.operands[1])]
    transposed = "trans" in inst.mods

    def run(m: Mask) -> None:
        batch.inst = inst
        whole_warps(batch, inst, m, batch.exists)
        warps, lanes = Warps(batch, m), row_lanes(batch, m, count)
        rows = np.stack([warps.take(value) for value in values], axis=1)  # [warps, count, 32]
        rows = rows.reshape(warps.count, count, 8, 4)
        if transposed:
            halves = rows.view(np.uint16).transpose(0, 1, 3, 2)
            rows = np.ascontiguousarray(halves).view(np.uint32)
        batch.shared.write(lanes, address(lanes), rows.reshape(-1, 4))

    return run


@binds("movmatrix")
def _move_matrix(inst: Inst, batch: Batch) -> Run:
    d, a = batch.dest(inst.operands[0], "b32"), batch.source(inst.operands[1], "b32")

    def run(m: Mask) -> None:
        whole_warps(batch, inst, m, batch.exists)
        warps = Warps(batch, m)
        rows = np.ascontiguousarray(warps.take(a)).reshape(-1, 8, 4).view(np.uint16)
        flipped = np.ascontiguousarray(rows.transpose(0, 2, 1)).view(np.uint32)
        warps.put(d, flipped.reshape(warps.count, 32))

    return run
