"""Shifts, bit fields, counts of bits, permutations of bytes.

Source: PTX ISA manual, sections 9.7.1 and 9.7.8.
"""

from __future__ import annotations

import numpy as np

from tools.simt.core import Batch, Mask, Run, binds
from tools.simt.integers import put, sources
from tools.simt.numbers import dtype_of
from tools.simt.program import TYPE_BYTES, Inst


@binds("shl", "shr")
def _shift(inst: Inst, batch: Batch) -> Run:
    kind = inst.type
    d, a = batch.dest(inst.operands[0], kind), batch.source(inst.operands[1], kind)
    amount = batch.source(inst.operands[2], "u32")
    width = TYPE_BYTES[kind] * 8
    last = np.uint32(width - 1)
    own = dtype_of(kind)
    signed = inst.op == "shr" and kind[0] == "s"
    function = np.left_shift if inst.op == "shl" else np.right_shift
    if not isinstance(amount, np.ndarray) and (amount < width or signed):
        count = np.minimum(amount, last).astype(own)
        return lambda m: function(a, count, out=d, where=m)

    def run(m: Mask) -> None:
        value = function(a, np.minimum(amount, last).astype(own))
        put(d, value if signed else np.where(amount > last, own.type(0), value), m)

    return run


@binds("shf")
def _funnel(inst: Inst, batch: Batch) -> Run:
    d = batch.dest(inst.operands[0], "u32")
    low, high, amount = sources(inst, batch, "u32")
    left, clamps = inst.mods[0] == "l", "clamp" in inst.mods

    def run(m: Mask) -> None:
        both = np.asarray(high).astype(np.uint64) << np.uint64(32) | low
        count = np.minimum(amount, 32) if clamps else np.bitwise_and(amount, 31)
        count = np.asarray(count).astype(np.uint64)
        shifted = (both << count) >> np.uint64(32) if left else both >> count
        put(d, shifted & np.uint64(0xFFFFFFFF), m)

    return run


@binds("popc", "clz", "brev", "bfind")
def _bits(inst: Inst, batch: Batch) -> Run:
    kind = inst.type
    width = TYPE_BYTES[kind] * 8
    d = batch.dest(inst.operands[0], kind if inst.op == "brev" else "u32")
    a = batch.source(inst.operands[1], kind)

    def run(m: Mask) -> None:
        bits = np.broadcast_to(np.asarray(a), batch.num_lanes).astype(a.dtype)
        if inst.op == "bfind" and kind[0] == "s":
            bits = np.where(bits < 0, ~bits, bits)
        raw = np.ascontiguousarray(bits).view(np.uint8).reshape(-1, width // 8)
        if inst.op == "brev":
            swapped = np.packbits(np.unpackbits(raw, axis=1, bitorder="little"), axis=1)
            return put(d, swapped.view(f">u{width // 8}")[:, 0], m)
        ones = np.unpackbits(raw[:, ::-1], axis=1)  # the most significant first
        if inst.op == "popc":
            return put(d, ones.sum(axis=1), m)
        leading = np.where(ones.any(axis=1), ones.argmax(axis=1), width)
        if inst.op == "clz":
            return put(d, leading, m)
        found = leading if "shiftamt" in inst.mods else width - 1 - leading
        put(d, np.where(leading == width, 0xFFFFFFFF, found), m)

    return run


@binds("bfe")
def _extract(inst: Inst, batch: Batch) -> Run:
    kind = inst.type
    width = TYPE_BYTES[kind] * 8
    d, a = batch.dest(inst.operands[0], kind), batch.source(inst.operands[1], kind)
    position, length = sources(inst, batch, "u32", 2)
    signed = kind[0] == "s"
    own = a.dtype

    def run(m: Mask) -> None:
        start = np.bitwise_and(position, 0xFF).astype(np.int64)
        count = np.bitwise_and(length, 0xFF).astype(np.int64)
        top = np.minimum(start + count, width)  # one above the field's highest bit
        left = np.clip(width - top, 0, width - 1).astype(own)
        # Shift the field to the top, then down: the sign or zeros follow it.
        value = (a << left) >> np.clip(width - top + start, 0, width - 1).astype(own)
        sign = (a >> own.type(width - 1)) if signed else own.type(0)
        value = np.where(start >= width, sign, value)
        put(d, np.where(count == 0, own.type(0), value), m)

    return run


@binds("bfi")
def _insert(inst: Inst, batch: Batch) -> Run:
    kind = "u" + inst.type[1:]
    width = TYPE_BYTES[kind] * 8
    d = batch.dest(inst.operands[0], kind)
    a, b = batch.source(inst.operands[1], kind), batch.source(inst.operands[2], kind)
    position, length = sources(inst, batch, "u32", 3)
    own = dtype_of(kind)

    def run(m: Mask) -> None:
        start = np.bitwise_and(position, 0xFF).astype(np.int64)
        count = np.bitwise_and(length, 0xFF).astype(np.int64)
        shift = np.minimum(start, width - 1).astype(own)
        ones = np.where(
            count >= width,
            ~own.type(0),
            (own.type(1) << np.minimum(count, width - 1).astype(own)) - own.type(1),
        )
        field = np.where(start >= width, own.type(0), ones << shift)
        put(d, (b & ~field) | ((a << shift) & field), m)

    return run


@binds("lop3")
def _lop3(inst: Inst, batch: Batch) -> Run:
    d = batch.dest(inst.operands[0], "b32")
    a, b, c = (batch.source(operand, "b32") for operand in inst.operands[1:4])
    table = inst.operands[4].bits

    def run(m: Mask) -> None:
        value = np.zeros(batch.num_lanes, np.uint32)
        for row in range(8):
            if table >> row & 1:
                value |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        put(d, value, m)

    return run


@binds("prmt")
def _permute(inst: Inst, batch: Batch) -> Run:
    d = batch.dest(inst.operands[0], "b32")
    a, b, c = sources(inst, batch, "b32")
    mode = inst.mods[1] if len(inst.mods) > 1 else ""
    # Byte numbers by the two lowest bits of the selector.
    table = {
        "f4e": [[i, i + 1, i + 2, i + 3] for i in range(4)],
        "b4e": [[i, (i - 1) % 8, (i - 2) % 8, (i - 3) % 8] for i in range(4)],
        "rc8": [[i] * 4 for i in range(4)],
        "ecl": [[max(i, j) for j in range(4)] for i in range(4)],
        "ecr": [[min(i, j) for j in range(4)] for i in range(4)],
        "rc16": [[0, 1, 0, 1], [2, 3, 2, 3]] * 2,
    }.get(mode)

    def run(m: Mask) -> None:
        both = np.broadcast_to(np.asarray(b, np.uint64) << np.uint64(32) | a, batch.num_lanes)
        value = np.zeros(batch.num_lanes, np.uint64)
        for place in range(4):
            if table:
                chosen = np.array(table, np.uint64)[np.bitwise_and(c, 3), place]
                sign = False
            else:
                nibble = np.right_shift(c, np.uint32(4 * place)).astype(np.uint64)
                chosen, sign = nibble & np.uint64(7), (nibble & np.uint64(8)) != 0
            byte = (both >> (chosen * np.uint64(8))) & np.uint64(0xFF)
            byte = np.where(sign, np.where(byte & np.uint64(0x80), 0xFF, 0), byte)
            value |= byte.astype(np.uint64) << np.uint64(8 * place)
        put(d, value, m)

    return run
