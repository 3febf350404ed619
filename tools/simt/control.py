"""Branches, barriers and the instructions by which the lanes of a warp talk to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.simt.core import Batch, Mask, Run, binds
from tools.simt.program import Imm, Inst, Operand, Pair, Symbol
from tools.simt.schedule import bits_of_warps


def guard_of(inst: Inst, batch: Batch) -> Any:
    """What gives the lanes of a mask for which an instruction's guard holds."""
    if inst.guard is None:
        return lambda m: m
    array, negated = batch.register(inst.guard[0]), inst.guard[1]
    return lambda m: np.logical_and(~array if negated else array, m)


def going(inst: Inst, batch: Batch, target: Any, following: int) -> Run:
    """The end of a block: lanes with the guard go to `target`, the others on."""
    guard = guard_of(inst, batch)

    def run(m: Mask) -> Any:
        if inst.guard is None:
            return target
        taken = guard(m)
        count = np.count_nonzero(taken)
        if not count:
            return following
        if count == (batch.num_lanes if m is True else np.count_nonzero(m)):
            return target
        return np.where(taken, target, following)

    return run


@binds("bra")
def _branch(inst: Inst, batch: Batch) -> Run:
    symbol = inst.operands[0]
    assert isinstance(symbol, Symbol)
    target = batch.block_at[batch.kernel.target(symbol)]
    return going(inst, batch, target, batch.binding.next)


@binds("brx")
def _branch_by_index(inst: Inst, batch: Batch) -> Run:
    index, table = batch.source(inst.operands[0], "u32"), inst.operands[1]
    labels = batch.kernel.tables[table.name]
    places = [batch.kernel.target(Symbol(name, 0, table.scopes)) for name in labels]
    targets = np.array([batch.block_at[place] for place in places])
    guard, following = guard_of(inst, batch), batch.binding.next

    def run(m: Mask) -> Any:
        return np.where(guard(m), targets[np.minimum(index, len(targets) - 1)], following)

    return run


@binds("exit", "ret")
def _exit(inst: Inst, batch: Batch) -> Run:
    return going(inst, batch, len(batch.blocks), batch.binding.next)


@binds("trap")
def _trap(inst: Inst, batch: Batch) -> Run:
    def run(m: Mask) -> None:
        batch.inst = inst
        batch.fault("trap", "the kernel gave up", int(batch.index(m)[0]))

    return run


@binds("setmaxnreg", "griddepcontrol", "nanosleep", "pmevent", "prefetch", "prefetchu")
def _nothing(inst: Inst, batch: Batch) -> Run:
    return lambda m: None


@binds("membar", "fence")
def _fence(inst: Inst, batch: Batch) -> Run:
    if "proxy" in inst.mods:
        return _proxy_fence(inst, batch)
    wide = not {"cta", "mbarrier_init"} & set(inst.mods)

    def run(m: Mask) -> None:
        races = batch.global_memory.races
        if races and wide:
            for lane in batch.index(m):
                races.fence(int(batch.cta_number[lane]), int(batch.thread[lane]))

    return run


def _proxy_fence(inst: Inst, batch: Batch) -> Run:
    def run(m: Mask) -> None:
        shadow = batch.shared.shadow
        if shadow and any(mod.startswith("async") for mod in inst.mods):
            warps = np.unique(batch.index(m) // 32)
            shadow.fence_proxy(warps // batch.num_warps, warps % batch.num_warps)

    return run


# Barriers.


@dataclass
class Barrier:
    """A named barrier of a CTA between two releases."""

    expected: int | None = None  # threads; None: all warps that have not left
    arrived: int = 0
    arriving: list[int] = field(default_factory=list)  # warps
    waiting: list[np.ndarray] = field(default_factory=list)  # lanes, as arrays
    votes: list[bool] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)  # what to do with the votes


class Barriers:
    """The named barriers of a batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.open: dict[tuple[int, int], Barrier] = {}
        batch.on_reset.append(self.open.clear)
        batch.on_exit.append(self.recheck)

    def recheck(self, m: np.ndarray) -> None:
        """Warps have left: barriers of all warps need fewer."""
        for key in list(self.open):
            self.try_release(key)

    def live_threads(self, cta: int) -> int:
        """32 times the warps of a CTA that have not left."""
        per_cta = self.batch.num_warps * 32
        live = self.batch.live[cta * per_cta : (cta + 1) * per_cta]
        return 32 * int(live.reshape(-1, 32).any(axis=1).sum())

    def arrive(
        self, m: Mask, ids: Any, counts: Any, waits: bool, votes: Any = None, result: Any = None
    ) -> None:
        """Lanes arrive at the barriers they name."""
        batch = self.batch
        lanes = batch.index(m)
        ids = np.broadcast_to(ids, batch.num_lanes)[lanes].astype(np.int64)
        keys = batch.cta[lanes] * 16 + (ids & 15)
        if waits:
            batch.parked[lanes] = True
        for key in np.unique(keys):
            mine = lanes[keys == key]
            cta, number = int(key) // 16, int(key) % 16
            barrier = self.open.setdefault((cta, number), Barrier())
            expected = None
            if counts is not None:
                expected = int(np.broadcast_to(counts, batch.num_lanes)[mine[0]])
            if barrier.arrived and barrier.expected != expected:
                text = f"barrier {number} wants {barrier.expected} and {expected} threads at once"
                batch.fault("barrier", text, int(mine[0]))
            barrier.expected = expected
            warps = np.unique(batch.warp[mine])
            barrier.arrived += 32 * len(warps)
            barrier.arriving.extend(warps.tolist())
            if waits:
                barrier.waiting.append(mine)
            if votes is not None:
                barrier.votes.extend(np.broadcast_to(votes, batch.num_lanes)[mine].tolist())
                barrier.results.append((mine, result))
            self.try_release((cta, number), int(mine[0]))

    def try_release(self, key: tuple[int, int], lane: int | None = None) -> None:
        """Let everyone go if all have arrived, `lane` as one of the last."""
        barrier, batch = self.open[key], self.batch
        expected = self.live_threads(key[0]) if barrier.expected is None else barrier.expected
        if barrier.arrived < expected or not barrier.arrived:
            return
        if barrier.arrived > expected and barrier.expected is not None:
            text = f"barrier {key[1]}: {barrier.arrived} threads arrived, {expected} were named"
            batch.fault("barrier", text, lane)
        lanes = np.concatenate(barrier.waiting) if barrier.waiting else batch.all[:0]
        batch.parked[lanes] = False
        batch.events += 1
        waiting = np.unique(batch.warp[lanes])
        batch.clocks.barrier(key[0], np.unique(barrier.arriving), waiting)
        for mine, result in barrier.results:
            result(mine, np.array(barrier.votes))
        del self.open[key]

    def describe(self) -> list[str]:
        """Barriers that wait, for a deadlock's report."""
        return [
            f"barrier {number} of CTA {cta} of the batch: {barrier.arrived} threads arrived of "
            f"{barrier.expected or self.live_threads(cta)}"
            for (cta, number), barrier in self.open.items()
        ]


def whole_warps(batch: Batch, inst: Inst, m: Mask, among: np.ndarray) -> None:
    """Refuse an .aligned instruction that only part of a warp executes."""
    if m is True or not batch.checks.divergence:
        return
    here = m.reshape(-1, 32).sum(axis=1)
    bad = (here > 0) & (here < (among & ~m).reshape(-1, 32).sum(axis=1) + here)
    if bad.any():
        warp = int(np.flatnonzero(bad)[0])
        batch.inst = inst
        text = f"only {here[warp]} lanes of a warp execute an instruction that needs all of them"
        batch.fault("divergence", text, int(np.flatnonzero(m[warp * 32 :])[0]) + warp * 32)


@binds("bar", "barrier")
def _barrier(inst: Inst, batch: Batch) -> Run:
    mods = [mod for mod in inst.mods if mod not in ("cta", "aligned")]
    if mods[0] == "warp":
        return _warp_barrier(inst, batch)
    if inst.op == "barrier" and mods[0] == "cluster":
        raise ValueError("clusters")
    barriers, guard, kind = batch.part(Barriers), guard_of(inst, batch), mods[0]
    operands = list(inst.operands)
    d = batch.dest(operands.pop(0), mods[2]) if kind == "red" else None
    votes = batch.predicate(operands.pop()) if kind == "red" else None
    ids = batch.source(operands[0], "u32")
    counts = batch.source(operands[1], "u32") if len(operands) > 1 else None

    def vote(lanes: np.ndarray, values: np.ndarray) -> None:
        combined = {"popc": values.sum(), "and": values.all(), "or": values.any()}[mods[1]]
        d[lanes] = combined

    def run(m: Mask) -> None:
        batch.inst = inst
        chosen = guard(m)
        whole_warps(batch, inst, chosen, batch.live)
        if chosen is True or chosen.any():
            if votes:
                barriers.arrive(chosen, ids, counts, True, votes(), vote)
            else:
                barriers.arrive(chosen, ids, counts, kind == "sync")

    return run


def _warp_barrier(inst: Inst, batch: Batch) -> Run:
    guard, mask = guard_of(inst, batch), inst.operands[0]
    members = Members(batch, inst, mask)

    def run(m: Mask) -> None:
        chosen = guard(m)
        members.check(chosen)
        warps = np.unique(batch.index(chosen) // 32)
        batch.clocks.finish_epoch(warps // batch.num_warps, warps % batch.num_warps)

    return run


# Collectives of a warp.


class Members:
    """The lanes that a membermask names."""

    def __init__(self, batch: Batch, inst: Inst, mask: Operand) -> None:
        self.batch, self.inst = batch, inst
        self.mask = batch.source(mask, "b32")
        self.full = isinstance(mask, Imm) and mask.bits & 0xFFFFFFFF == 0xFFFFFFFF

    def bits(self) -> np.ndarray:
        """The mask of every lane."""
        return np.broadcast_to(self.mask, self.batch.num_lanes)

    def check(self, m: Mask) -> None:
        """Refuse a mask that names lanes which are not here, or not the lane itself."""
        batch = self.batch
        if (m is True and self.full) or not batch.checks.divergence:
            return
        m = np.ones(batch.num_lanes, bool) if m is True else m
        bits = self.bits()
        absent = np.repeat(bits_of_warps(batch.exists & ~m), 32)
        outside = (bits >> batch.lane.astype(np.uint32)) & 1 == 0
        bad = m & ((bits & absent != 0) | outside)
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            batch.inst = self.inst
            text = f"membermask {int(bits[first]):#x} does not name the lanes that are here"
            batch.fault("divergence", text, first)


@binds("shfl")
def _shuffle(inst: Inst, batch: Batch) -> Run:
    to, a, b, c, mask = inst.operands
    to, flag = (to.first, to.second) if isinstance(to, Pair) else (to, None)
    d, value = batch.dest(to, "b32"), batch.source(a, "b32")
    p = batch.dest(flag, "pred")
    offset, clamp = batch.source(b, "u32"), batch.source(c, "u32")
    members, mode = Members(batch, inst, mask), inst.mods[1]
    lane, warp_start = batch.lane, batch.all - batch.lane

    def sources() -> tuple[np.ndarray, Any]:
        by = np.bitwise_and(offset, 31).astype(np.int64)
        segment = (np.asarray(clamp) >> 8 & 31).astype(np.int64)
        last = (lane & segment) | (np.bitwise_and(clamp, 31).astype(np.int64) & ~segment)
        if mode == "up":
            j = lane - by
            valid = j >= last
        else:
            j = {"down": lane + by, "bfly": lane ^ by, "idx": (lane & segment) | (by & ~segment)}[
                mode
            ]
            valid = j <= last
        return warp_start + np.where(valid, j, lane), valid

    constant = isinstance(b, Imm) and isinstance(c, Imm)
    fixed = sources() if constant else None

    def run(m: Mask) -> None:
        members.check(m)
        at, valid = fixed or sources()
        if m is not True and batch.checks.divergence:
            bad = m & ~m[at]
            if bad.any():
                batch.inst = inst
                batch.fault(
                    "divergence", "shfl from a lane that is not here", int(np.flatnonzero(bad)[0])
                )
        source = np.broadcast_to(value, batch.num_lanes)[at]
        np.copyto(d, source, where=m)
        np.copyto(p, valid, where=m)

    return run


@binds("vote", "activemask", "match", "redux", "elect")
def _vote(inst: Inst, batch: Batch) -> Run:
    kind = next((mod for mod in inst.mods if mod not in ("sync", inst.type)), inst.op)
    to = inst.operands[0]
    first, second = (to.first, to.second) if isinstance(to, Pair) else (to, None)
    size = "pred" if inst.op == "vote" and kind != "ballot" else "b32"
    d, p = batch.dest(first, size), batch.dest(second, "pred")
    members = None if kind == "activemask" else Members(batch, inst, inst.operands[-1])
    values = None
    if inst.op == "vote":
        values = batch.predicate(inst.operands[1])
    elif inst.op in ("match", "redux"):
        source = batch.source(inst.operands[1], inst.type)
        values = lambda: source  # noqa: E731

    def run(m: Mask) -> None:
        if members:
            members.check(m)
        here = np.ones(batch.num_lanes, bool) if m is True else m
        taking = here
        rows = taking.reshape(-1, 32)
        if kind in ("activemask", "ballot", "all", "any", "uni") and inst.op != "match":
            value = True if values is None else np.broadcast_to(values(), batch.num_lanes)
            yes = bits_of_warps(taking & value)
            everyone = bits_of_warps(taking)
            result = {
                "all": yes == everyone,
                "any": yes != 0,
                "uni": (yes == everyone) | (yes == 0),
            }.get(kind, yes)
            return np.copyto(d, np.repeat(result, 32), where=m)
        if kind == "elect":
            leader = np.repeat(rows.argmax(axis=1), 32)
            np.copyto(d, leader, where=m, casting="unsafe")
            return np.copyto(p, batch.lane == leader, where=m)
        table = np.broadcast_to(values(), batch.num_lanes).reshape(-1, 32)
        if inst.op == "match":
            same = (table[:, :, None] == table[:, None, :]) & rows[:, None, :]
            bits = np.packbits(same, axis=2, bitorder="little").view(np.uint32).reshape(-1)
            agree = bits == np.repeat(bits_of_warps(taking), 32)
            np.copyto(d, bits if kind == "any" else np.where(agree, bits, 0), where=m)
            return np.copyto(p, agree, where=m)
        np.copyto(d, np.repeat(reduce_rows(kind, table, rows), 32).view(d.dtype), where=m)

    return run


def reduce_rows(kind: str, table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Combine the values [warps, 32] of the lanes that take part."""
    own = np.iinfo(table.dtype)
    ufunc, neutral = {
        "add": (np.add, 0),
        "min": (np.minimum, own.max),
        "max": (np.maximum, own.min),
        "and": (np.bitwise_and, -1 if own.min else own.max),
        "or": (np.bitwise_or, 0),
        "xor": (np.bitwise_xor, 0),
    }[kind]
    filled = np.where(rows, table, table.dtype.type(neutral))
    return ufunc.reduce(filled, axis=1, dtype=table.dtype)
