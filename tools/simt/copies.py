"""cp.async: copies into shared memory that arrive as late as the program allows.

A copy's bytes are written when its thread waits for its group. In between they are marked as in
flight, and touching them is an error.
Source: PTX ISA manual, section 9.7.9.25.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from tools.simt.access import address_of
from tools.simt.core import Batch, Mask, Run, binds
from tools.simt.program import Imm, Inst

OPEN = 1 << 30  # the number of a group that is not committed yet


@dataclass(eq=False)
class Copies:
    """Copies issued together: lanes, flat shared offsets, data rows, and each lane's group."""

    inst: Inst | None
    lanes: np.ndarray
    flat: np.ndarray
    data: np.ndarray
    group: np.ndarray
    serial: int
    moved_bytes: int  # by all so far


class AsyncCopies:
    """What is in flight in a batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.flying: list[Copies] = []
        self.num_groups = np.zeros(batch.num_lanes, np.int64)
        self.serial = 0
        batch.on_reset.append(self.reset)
        batch.on_exit.append(self.check_exit)

    def reset(self) -> None:
        """Nothing in flight."""
        self.flying.clear()
        self.num_groups[:] = 0

    def issue(self, lanes: np.ndarray, flat: np.ndarray, data: np.ndarray, num_bytes: int) -> None:
        """Begin copies of data rows [n, words], so many bytes of which exist, to offsets [n]."""
        shadow = self.batch.shared.shadow
        if shadow:
            at = shadow.granules(flat, data.shape[1] * 4)
            shadow.begin_flight(lanes, at)
        self.serial += 1
        group, moved = np.full(len(lanes), OPEN), self.batch.move(num_bytes)
        self.flying.append(Copies(self.batch.inst, lanes, flat, data, group, self.serial, moved))

    def commit(self, m: Mask) -> None:
        """Close the open group of every lane."""
        for copies in self.flying:
            mine = copies.group == OPEN
            if m is not True:
                mine &= m[copies.lanes]
            copies.group = np.where(mine, self.num_groups[copies.lanes], copies.group)
        np.add(self.num_groups, 1, out=self.num_groups, where=m)

    def wait(self, m: Mask, newest: int) -> None:
        """Deliver all but the newest groups of every lane."""
        limit = self.num_groups - newest
        for copies in list(self.flying):
            ready = copies.group < limit[copies.lanes]
            if m is not True:
                ready &= m[copies.lanes]
            self.deliver(copies, ready)

    def deliver_issued(self, lanes: np.ndarray, serial: int) -> None:
        """Deliver everything lanes had issued when `serial` was the last."""
        for copies in list(self.flying):
            if copies.serial <= serial:
                self.deliver(copies, np.isin(copies.lanes, lanes))

    def deliver(self, copies: Copies, ready: np.ndarray) -> None:
        """Write what is ready."""
        if not ready.any():
            return
        self.batch.arrived(copies.moved_bytes)
        shared = self.batch.shared
        words = copies.data.shape[1]
        flat, lanes = copies.flat[ready], copies.lanes[ready]
        shared.view(4, words)[flat // (4 * words)] = (
            copies.data[ready] if words > 1 else copies.data[ready, 0]
        )
        if shared.shadow:
            shared.shadow.mark(lanes, shared.shadow.granules(flat, 4 * words))
        if ready.all():
            self.flying.remove(copies)
            return
        rest = ~ready
        copies.lanes, copies.flat = copies.lanes[rest], copies.flat[rest]
        copies.data, copies.group = copies.data[rest], copies.group[rest]

    def check_exit(self, m: np.ndarray) -> None:
        """Refuse to leave with copies in flight."""
        if not self.batch.checks.pending:
            return
        for copies in self.flying:
            leaving = np.flatnonzero(m[copies.lanes])
            if len(leaving):
                self.batch.inst, shared = copies.inst, self.batch.shared
                offset = int(copies.flat[leaving[0]]) % shared.stride - shared.base
                text = f"left the kernel with a cp.async copy to offset {offset} in flight"
                self.batch.fault("pending", text, int(copies.lanes[leaving[0]]))


@binds("cp")
def _copy(inst: Inst, batch: Batch) -> Run:
    if "bulk" in inst.mods:
        from tools.simt.bulk import bulk_binder

        return bulk_binder(inst, batch)
    copies = batch.part(AsyncCopies)
    if "commit_group" in inst.mods:
        return copies.commit
    if "wait_group" in inst.mods:
        assert isinstance(inst.operands[0], Imm)
        newest = inst.operands[0].bits
        return lambda m: copies.wait(m, newest)
    if "wait_all" in inst.mods:

        def wait_all(m: Mask) -> None:
            copies.commit(m)
            copies.wait(m, 0)

        return wait_all
    if "mbarrier" in inst.mods:
        return _arrive_when_done(inst, batch, copies)
    to, source = address_of(batch, inst.operands[0]), address_of(batch, inst.operands[1])
    assert isinstance(inst.operands[2], Imm)
    size = inst.operands[2].bits
    hint = any("cache_hint" in mod for mod in inst.mods)
    extra = inst.operands[3 : len(inst.operands) - hint]
    ignored = extra and getattr(extra[0], "type", "") == "pred"
    given = batch.source(extra[0], "pred" if ignored else "u32") if extra else None

    def run(m: Mask) -> None:
        batch.inst = inst
        lanes = batch.index(m)
        flat = batch.shared.locate(lanes, to(lanes), size)
        if batch.profile:
            batch.shared.count_passes("copy", lanes, flat, size)
        data = np.zeros((len(lanes), size // 4), np.uint32)
        wanted = np.full(len(lanes), size)
        if given is not None:
            value = np.broadcast_to(given, batch.num_lanes)[lanes]
            wanted = np.where(value, 0, size) if ignored else value.astype(np.int64)
        addresses = source(lanes)
        whole = wanted == size
        if whole.any():
            data[whole] = batch.global_memory.read(lanes[whole], addresses[whole], 4, size // 4)
        for one in np.flatnonzero(~whole & (wanted > 0)):  # the rest stays zero
            raw = data[one].view(np.uint8)
            for byte in range(int(wanted[one])):
                at = addresses[one : one + 1] + np.uint64(byte)
                raw[byte] = batch.global_memory.read(lanes[one : one + 1], at, 1, 1)[0, 0]
        copies.issue(lanes, flat, data, int(wanted.sum()))

    return run


def _arrive_when_done(inst: Inst, batch: Batch, copies: AsyncCopies) -> Run:
    from tools.simt.mbarrier import Mbarriers

    barriers, address = batch.part(Mbarriers), address_of(batch, inst.operands[0])
    counted = "noinc" in inst.mods

    def run(m: Mask) -> None:
        batch.inst = inst
        lanes, serial = batch.index(m), copies.serial
        places = barriers.flat(lanes, address(lanes))
        for flat in np.unique(places):
            mine = lanes[places == flat]
            deliver = functools.partial(copies.deliver_issued, mine, serial)
            barriers.arrive_later(mine, int(flat), counted, deliver)

    return run
