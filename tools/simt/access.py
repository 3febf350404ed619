"""Loads, stores, atomics and address conversions, in every state space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tools.simt.core import Batch, Mask, Run, binds
from tools.simt.global_memory import GlobalMemory
from tools.simt.memory import GLOBAL_BASE, LOCAL_WINDOW, SHARED_WINDOW
from tools.simt.numbers import UINT, dtype_of, from_bf16, to_bf16, unpack
from tools.simt.program import TYPE_BYTES, Imm, Inst, Mem, Reg, Symbol, Vec
from tools.simt.shared import vector_width

STRONG = {"volatile", "relaxed", "acquire", "release"}
SPACES = ("global", "shared", "local", "param", "const")


class Local:
    """Every thread's own memory."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.num_bytes = -(-batch.symbols.get("local bytes", 0) // 16) * 16 or 16
        self.bytes = np.full(batch.num_lanes * self.num_bytes, 0xFF, np.uint8)

    def locate(self, lanes: np.ndarray, addresses: np.ndarray, num_bytes: int) -> np.ndarray:
        """Flat offsets, checked for bounds."""
        at = addresses.astype(np.int64)
        bad = (at < 0) | (at + num_bytes > self.num_bytes)
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            text = f"local access at {int(at[first])} of {self.num_bytes} bytes"
            self.batch.fault("bounds", text, int(lanes[first]))
        return lanes * self.num_bytes + at

    def read(self, lanes: np.ndarray, addresses: np.ndarray, width: int, count: int) -> np.ndarray:
        """Values [n, count] at addresses [n]."""
        at = self.locate(lanes, addresses, width * count) // width
        return self.bytes.view(UINT[width])[at[:, None] + np.arange(count)]

    def write(self, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        """Store values [n, count] at addresses [n]."""
        width, count = values.dtype.itemsize, values.shape[1]
        at = self.locate(lanes, addresses, width * count) // width
        self.bytes.view(UINT[width])[at[:, None] + np.arange(count)] = values


class Generic:
    """The space of generic addresses: each lane's address says which memory it means."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def split(self, lanes: np.ndarray, addresses: np.ndarray) -> list[tuple[Any, Any, Any]]:
        """(space, which of the lanes, addresses in that space)."""
        parts = []
        local, shared = addresses >= LOCAL_WINDOW, addresses >= SHARED_WINDOW
        for space, chosen, base in (
            ("local", local, LOCAL_WINDOW),
            ("shared", shared & ~local, SHARED_WINDOW),
            ("global", ~shared, 0),
        ):
            if chosen.any():
                found = np.flatnonzero(chosen)
                parts.append(
                    (space_of(self.batch, space), found, addresses[found] - np.uint64(base))
                )
        return parts

    def read(self, lanes: np.ndarray, addresses: np.ndarray, width: int, count: int) -> np.ndarray:
        """Values [n, count] at addresses [n]."""
        values = np.zeros((len(lanes), count), UINT[width])
        for space, found, at in self.split(lanes, addresses):
            values[found] = space.read(lanes[found], at, width, count)
        return values

    def write(self, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        """Store values [n, count] at addresses [n]."""
        for space, found, at in self.split(lanes, addresses):
            space.write(lanes[found], at, values[found])


def space_of(batch: Batch, name: str | None) -> Any:
    """The memory of a state space; parameters and constants are global."""
    if name == "shared":
        return batch.shared
    if name == "local":
        return batch.part(Local)
    return batch.part(Generic) if name is None else batch.global_memory


def space_name(inst: Inst) -> str | None:
    """The state space an instruction names, or None."""
    names = (mod.split("::")[0] for mod in inst.mods)
    return next((name for name in names if name in SPACES), None)


def address_of(batch: Batch, operand: Any) -> Callable[[np.ndarray], np.ndarray]:
    """What gives the addresses [n] of lanes [n]."""
    assert isinstance(operand, Mem)
    base, offset = operand.base, operand.offset & (1 << 64) - 1
    if isinstance(base, Reg):
        wide = TYPE_BYTES[base.type] == 8
        array = batch.source(base, "u64" if wide else "u32")
        extra = np.uint64(offset)
        if wide:
            return lambda lanes: array[lanes] + extra
        return lambda lanes: (array[lanes].astype(np.uint64) + extra) & np.uint64(0xFFFFFFFF)
    if isinstance(base, Symbol):
        value = batch.symbols[base.name] + base.offset + operand.offset
    else:
        assert isinstance(base, Imm)
        value = base.bits + operand.offset
    return lambda lanes: np.full(len(lanes), value, np.uint64)


@binds("ld", "ldu")
def _load(inst: Inst, batch: Batch) -> Run:
    to, source = inst.operands[:2]
    kind, count = inst.type, vector_width(to)
    size = TYPE_BYTES[kind]
    bits = kind if kind[0] == "s" else f"b{8 * size}"
    items = to.items if isinstance(to, Vec) else (to,)
    dests = [batch.dest(item, bits) for item in items]
    own = dtype_of(bits)
    name = space_name(inst)
    if name == "param" and isinstance(source.base, Symbol):
        return _load_param(inst, batch, dests, own, count)
    space, address = space_of(batch, name), address_of(batch, source)
    strong = name == "global" and not STRONG.isdisjoint(inst.mods)

    def run(m: Mask) -> None:
        batch.inst = inst
        lanes = batch.index(m)
        if strong:
            rows = batch.global_memory.read_strongly(lanes, address(lanes), size, count, inst.mods)
        else:
            rows = space.read(lanes, address(lanes), size, count)
        rows = rows.view(own)
        where = slice(None) if m is True else lanes
        for number, d in enumerate(dests):
            d[where] = rows[:, number]

    return run


def _load_param(inst: Inst, batch: Batch, dests: list[np.ndarray], own: Any, count: int) -> Run:
    base = inst.operands[1].base
    begin = batch.symbols[base.name] + base.offset + inst.operands[1].offset - GLOBAL_BASE

    def run(m: Mask) -> None:
        raw = batch.device.bytes[begin : begin + own.itemsize * count]
        for d, value in zip(dests, raw.view(own), strict=True):
            np.copyto(d, value, where=m)

    return run


@binds("st")
def _store(inst: Inst, batch: Batch) -> Run:
    to, source = inst.operands[:2]
    size, count = TYPE_BYTES[inst.type], vector_width(source)
    space, address = space_of(batch, space_name(inst)), address_of(batch, to)
    items = source.items if isinstance(source, Vec) else (source,)
    strong = space_name(inst) == "global" and not STRONG.isdisjoint(inst.mods)
    bits = f"b{8 * size}"
    kind = inst.type if isinstance(items[0], Imm) else bits
    values = [np.asarray(batch.source(item, kind)).view(dtype_of(bits)) for item in items]

    def run(m: Mask) -> None:
        batch.inst = inst
        lanes = batch.index(m)
        rows = np.empty((len(lanes), count), UINT[size])
        for number, value in enumerate(values):
            rows[:, number] = value[lanes] if value.ndim else value
        if strong:
            batch.global_memory.write_strongly(lanes, address(lanes), rows, inst.mods)
        else:
            space.write(lanes, address(lanes), rows)

    return run


@binds("cvta")
def _to_generic(inst: Inst, batch: Batch) -> Run:
    name = space_name(inst)
    base = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(name or "", 0)
    kind = inst.type
    d, a = batch.dest(inst.operands[0], kind), batch.source(inst.operands[1], kind)
    if not base or kind == "u32":
        return lambda m: np.copyto(d, a, where=m)
    function = np.subtract if "to" in inst.mods else np.add
    return lambda m: function(a, np.uint64(base), out=d, where=m)


@binds("isspacep")
def _is_space(inst: Inst, batch: Batch) -> Run:
    p, a = batch.dest(inst.operands[0], "pred"), batch.source(inst.operands[1], "u64")
    low, high = {
        "global": (0, SHARED_WINDOW),
        "shared": (SHARED_WINDOW, LOCAL_WINDOW),
        "local": (LOCAL_WINDOW, LOCAL_WINDOW << 1),
    }[inst.mods[0]]
    return lambda m: np.copyto(p, (a >= low) & (a < high), where=m)


# Atomics.

INTEGER_UPDATES: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
    "exch": lambda old, new: new,
    "inc": lambda old, top: np.where(old >= top, 0, old + 1).astype(old.dtype),
    "dec": lambda old, top: np.where((old == 0) | (old > top), top, old - 1).astype(old.dtype),
}


def update_of(op: str, kind: str) -> tuple[Callable[[Any, Any], Any], np.dtype]:
    """The new value of an atomic, and the type it is computed in."""
    if op in ("exch", "cas", "and", "or", "xor"):
        size = TYPE_BYTES[kind]
        return INTEGER_UPDATES.get(op, lambda old, new: new), np.dtype(UINT[size])
    if kind in ("bf16", "f16x2", "bf16x2", "f16"):
        return _narrow_update(op, kind), np.dtype(UINT[TYPE_BYTES[kind]])
    if kind[0] == "f" and op in ("min", "max"):
        return (np.fmin if op == "min" else np.fmax), dtype_of(kind)
    return INTEGER_UPDATES[op], dtype_of(kind if kind[0] != "b" else "u" + kind[1:])


def _narrow_update(op: str, kind: str) -> Callable[[Any, Any], Any]:
    combine = {"add": np.add, "min": np.fmin, "max": np.fmax}[op]
    base = kind.removesuffix("x2")

    def pack(x: np.ndarray) -> np.ndarray:
        return to_bf16(x) if base == "bf16" else x.astype(np.float16).view(np.uint16)

    def update(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        if kind.endswith("x2"):
            pairs = zip(unpack(old, base), unpack(new, base), strict=True)
            low, high = (pack(combine(a, b)).astype(np.uint32) for a, b in pairs)
            return low | high << np.uint32(16)
        if base == "bf16":
            return pack(combine(from_bf16(old), from_bf16(new)))
        both = (x.view(np.float16).astype(np.float32) for x in (old, new))
        return pack(combine(*both))

    return update


@binds("atom", "red")
def _atomic(inst: Inst, batch: Batch) -> Run:
    operands = list(inst.operands)
    to = operands.pop(0) if inst.op == "atom" else None
    place, source, *rest = operands
    op = next(m for m in inst.mods if m in INTEGER_UPDATES or m == "cas")
    kind = inst.type
    size, count = TYPE_BYTES[kind], vector_width(source)
    update, own = update_of(op, kind)
    bits = f"b{8 * size}"
    items = source.items if isinstance(source, Vec) else (source,)
    values = [np.asarray(batch.source(item, bits)) for item in items]
    swap = np.asarray(batch.source(rest[0], bits)) if op == "cas" else None
    to_items = to.items if isinstance(to, Vec) else (to,) * count
    dests = [batch.dest(item, bits) for item in to_items]
    space, address = space_of(batch, space_name(inst)), address_of(batch, place)
    meets = inst.op == "atom" and to is not None and kind[0] != "f" and "f16" not in kind

    def run(m: Mask) -> None:
        batch.inst = inst
        lanes = batch.index(m)
        for memory, found, at in place_atomics(batch, space, lanes, address(lanes)):
            chosen = lanes[found]
            for number in range(count):
                flat, view = memory(chosen, at + np.uint64(size * number), size)
                new = np.broadcast_to(values[number], batch.num_lanes)[chosen].view(own)
                extra = None
                if swap is not None:
                    extra = np.broadcast_to(swap, batch.num_lanes)[chosen].view(own)
                dests[number][chosen] = in_turn(view.view(own), flat, new, extra, update).view(
                    UINT[size]
                )
            if meets and batch.global_memory.races and len(chosen) <= 64:
                batch.global_memory.meet(chosen, at, inst.mods)

    return run


def in_turn(view: np.ndarray, at: np.ndarray, new: Any, swap: Any, update: Any) -> np.ndarray:
    """Update memory lane after lane; returns what each lane found. Vectorised over addresses."""
    old = np.empty(len(at), view.dtype)
    order = np.argsort(at, kind="stable")
    sorted_at = at[order]
    first = np.r_[True, sorted_at[1:] != sorted_at[:-1]]
    start = np.maximum.accumulate(np.where(first, np.arange(len(at)), 0))
    rank = np.arange(len(at)) - start  # how many lanes are before at the same address
    for turn in range(int(rank.max()) + 1 if len(at) else 0):
        now = order[rank == turn]
        found = view[at[now]]
        old[now] = found
        if swap is not None:
            view[at[now]] = np.where(found == new[now], swap[now], found)
        else:
            view[at[now]] = update(found, new[now])
    return old


def place_atomics(batch: Batch, space: Any, lanes: np.ndarray, addresses: np.ndarray) -> Any:
    """(what locates and checks, which lanes, addresses) for every memory the addresses mean."""

    def in_shared(chosen: np.ndarray, at: np.ndarray, size: int) -> tuple[Any, Any]:
        shared = batch.shared
        flat = shared.locate(chosen, at, size)
        if shared.shadow:
            shared.shadow.atomic(chosen, shared.shadow.granules(flat, size))
        return flat // size, shared.view(size)

    def in_global(chosen: np.ndarray, at: np.ndarray, size: int) -> tuple[Any, Any]:
        memory: GlobalMemory = batch.global_memory
        offsets = memory.locate(chosen, at, size)
        if memory.fresh:
            memory.check_written(chosen, offsets, size)
        if memory.races:
            memory.check_write(chosen, offsets, size, None)
        if batch.profile:
            memory.count_sectors("atomic", chosen, offsets, size)
        return offsets // size, batch.device.view(size)

    if isinstance(space, Generic):
        parts = space.split(lanes, addresses)
    else:
        parts = [(space, np.arange(len(lanes)), addresses)]
    return [
        (in_shared if memory is batch.shared else in_global, found, at)
        for memory, found, at in parts
    ]


@binds("mapa")
def _map_address(inst: Inst, batch: Batch) -> Run:
    d, a = batch.dest(inst.operands[0], inst.type), batch.source(inst.operands[1], inst.type)
    return lambda m: np.copyto(d, a, where=m)  # a cluster of one CTA
