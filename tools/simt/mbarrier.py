"""mbarriers: arrivals, transaction bytes, phases, and waits that park their lanes.

A copy that signals an mbarrier is delivered at the first wait that needs it.
Source: PTX ISA manual, section 9.7.13.15.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.simt.access import address_of
from tools.simt.control import guard_of
from tools.simt.core import Batch, Mask, Run, binds
from tools.simt.memory import SHARED_WINDOW
from tools.simt.program import Inst, Mem, Pair
from tools.simt.shadow import MBARRIER, WRITTEN

MAX_COUNT = (1 << 20) - 1


@dataclass
class Event:
    """A copy that will signal an mbarrier: what delivers it, and which lane issued it."""

    deliver: Callable[[], None]
    inst: Inst | None
    lane: int


@dataclass
class Mbarrier:
    """One mbarrier object."""

    cta: int
    offset: int
    expected: int
    pending: int
    made_by: tuple[int, int]  # warp and the epoch it was initialised in
    clock: np.ndarray  # what the arrivals of this phase have released
    done: np.ndarray  # what those of all earlier phases had
    tx: int = 0
    phase: int = 0
    events: list[Event] = field(default_factory=list)


class Mbarriers:
    """The mbarriers of a batch, by flat offset into shared memory."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.objects: dict[int, Mbarrier] = {}
        self.waits_for = np.full(batch.num_lanes, -1, np.int64)
        self.may_fail = np.zeros(batch.num_lanes, bool)
        batch.on_reset.append(self.reset)
        batch.on_done.append(self.check_done)

    def reset(self) -> None:
        """No mbarriers."""
        self.objects.clear()
        self.waits_for[:] = -1
        self.may_fail[:] = False

    def flat(self, lanes: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        """Flat offsets of mbarriers, from addresses in shared memory or generic ones."""
        window = np.uint64(SHARED_WINDOW)
        addresses = np.where(addresses >= window, addresses - window, addresses)
        return self.batch.shared.locate(lanes, addresses, 8)

    def find(self, flat: int, lane: int) -> Mbarrier:
        """The object at a place, used by a lane."""
        batch = self.batch
        barrier = self.objects.get(flat)
        if barrier is None:
            offset = flat % batch.shared.stride - batch.shared.base
            batch.fault("mbarrier", f"no mbarrier was initialised at offset {offset}", lane)
        warp, epoch = barrier.made_by
        mine = batch.warp[lane]
        known = batch.clocks.known[batch.cta[lane], mine, warp]
        if batch.checks.race and warp != mine and known < epoch:
            text = f"the mbarrier at offset {barrier.offset} was initialised by warp {warp} with "
            batch.fault("race", text + "nothing between", lane)
        return barrier

    def init(self, lane: int, flat: int, count: int) -> None:
        """mbarrier.init."""
        batch, shadow = self.batch, self.batch.shared.shadow
        offset = flat % batch.shared.stride - batch.shared.base
        if batch.checks.mbarrier and not 0 < count <= MAX_COUNT:
            batch.fault("mbarrier", f"initialised for {count} arrivals", lane)
        if batch.checks.mbarrier and flat in self.objects:
            batch.fault("mbarrier", f"initialised twice at offset {offset}", lane)
        if shadow:
            lanes, at = np.array([lane]), shadow.granules(np.array([flat]), 8)
            shadow.write(lanes, at)
            shadow.flags[at] = WRITTEN | MBARRIER
        zeros = np.zeros(batch.clocks.num_actors, np.int32)
        epoch = int(batch.own_epoch(np.array([lane]))[0]) + 1
        made_by = (int(batch.warp[lane]), epoch)
        cta = int(batch.cta[lane])
        self.objects[flat] = Mbarrier(cta, offset, count, count, made_by, zeros, zeros.copy())

    def invalidate(self, lane: int, flat: int) -> None:
        """mbarrier.inval."""
        self.find(flat, lane)
        del self.objects[flat]
        shadow = self.batch.shared.shadow
        if shadow:
            shadow.flags[shadow.granules(np.array([flat]), 8)] = 0

    def arrive(
        self,
        barrier: Mbarrier,
        count: int,
        tx: int,
        clock: np.ndarray | None,
        *,
        drop: bool = False,
        lane: int | None = None,
    ) -> None:
        """Count arrivals, of `lane` and others, add to the expected bytes, and release a clock."""
        batch = self.batch
        if clock is not None:
            np.maximum(barrier.clock, clock, out=barrier.clock)
        barrier.tx += tx
        barrier.pending -= count
        barrier.expected -= count if drop else 0
        if barrier.pending < 0 and batch.checks.mbarrier:
            text = f"more arrivals than the mbarrier at offset {barrier.offset} expects "
            batch.fault("mbarrier", text + f"({barrier.expected})", lane)
        if barrier.pending <= 0 and barrier.tx == 0:
            barrier.phase += 1
            barrier.pending = barrier.expected
            np.maximum(barrier.done, barrier.clock, out=barrier.done)
            batch.events += 1
            self.wake(barrier)

    def wake(self, barrier: Mbarrier) -> None:
        """Let the lanes that wait for an mbarrier look again."""
        flat = barrier.cta * self.batch.shared.stride + barrier.offset + self.batch.shared.base
        waiting = self.waits_for == flat
        self.batch.parked[waiting] = False
        self.waits_for[waiting] = -1

    def complete_tx(self, barrier: Mbarrier, num_bytes: int, clock: np.ndarray) -> None:
        """Bytes of a copy have arrived."""
        self.arrive(barrier, 0, -num_bytes, clock)

    def arrive_later(self, lanes: np.ndarray, flat: int, counted: bool, deliver: Any) -> None:
        """cp.async.mbarrier.arrive: lanes arrive when their copies have."""
        barrier = self.find(flat, int(lanes[0]))
        if not counted:
            barrier.pending += len(lanes)

        def event() -> None:
            deliver()
            cta = barrier.cta
            clocks = [
                self.batch.clocks.release(cta, warp) for warp in np.unique(self.batch.warp[lanes])
            ]
            self.arrive(barrier, len(lanes), 0, np.max(clocks, axis=0))

        barrier.events.append(Event(event, self.batch.inst, int(lanes[0])))

    def complete(self, barrier: Mbarrier, value: int, parity: bool) -> bool:
        """Whether a wait may go on; delivers what is late if that helps."""

        def done() -> bool:
            return (barrier.phase & 1) != value if parity else barrier.phase > value

        while not done() and barrier.events:
            barrier.events.pop(0).deliver()
        return done()

    def waiting(self) -> np.ndarray:
        """Lanes parked at an mbarrier."""
        return self.batch.parked & (self.waits_for >= 0)

    def let_fail(self, lanes: np.ndarray) -> None:
        """Wake lanes though nothing has happened: try_wait may give up."""
        self.may_fail |= lanes
        self.batch.parked &= ~lanes

    def check_done(self) -> None:
        """Refuse to end with copies that nobody waited for."""
        left = [event for barrier in self.objects.values() for event in barrier.events]
        if self.batch.checks.pending and left:
            self.batch.inst = left[0].inst
            text = "left the kernel with copies in flight to an mbarrier"
            self.batch.fault("pending", text, left[0].lane)

    def describe(self) -> list[str]:
        """The state of every mbarrier, for a deadlock's report."""
        return [
            f"mbarrier at offset {b.offset} of CTA {b.cta} of the batch: phase {b.phase}, "
            f"{b.pending} of {b.expected} arrivals missing, {b.tx} bytes outstanding"
            for b in self.objects.values()
        ]


@binds("mbarrier")
def _mbarrier(inst: Inst, batch: Batch) -> Run:
    barriers, kind = batch.part(Mbarriers), inst.mods[0]
    if kind in ("try_wait", "test_wait"):
        return _wait(inst, batch, barriers)
    if kind == "pending_count":
        raise ValueError("mbarrier.pending_count")
    place = next(number for number, o in enumerate(inst.operands) if isinstance(o, Mem))
    to = inst.operands[0] if place else None
    d = batch.dest(to.first if isinstance(to, Pair) else to, "b64") if place else None
    address, rest = address_of(batch, inst.operands[place]), inst.operands[place + 1 :]
    value = batch.source(rest[0], "u32") if rest else np.uint32(1)
    bytes_expected = "expect_tx" in inst.mods
    if bytes_expected and len(rest) > 1:
        raise ValueError("arrive.expect_tx with a count")

    def run(m: Mask) -> None:
        batch.inst = inst
        lanes = batch.index(m)
        places = barriers.flat(lanes, address(lanes))
        amounts = np.broadcast_to(value, batch.num_lanes)[lanes].astype(np.int64)
        for flat in np.unique(places):
            mine = places == flat
            first = int(lanes[mine][0])
            flat = int(flat)
            if kind == "init":
                for lane, amount in zip(lanes[mine], amounts[mine], strict=True):
                    barriers.init(int(lane), flat, int(amount))
                continue
            if kind == "inval":
                barriers.invalidate(first, flat)
                continue
            barrier = barriers.find(flat, first)
            total = int(amounts[mine].sum())
            if d is not None:
                d[lanes[mine]] = barrier.phase
            if kind == "expect_tx":
                barrier.tx += total
            elif kind == "complete_tx":
                barriers.arrive(barrier, 0, -total, None)
            else:
                warps = np.unique(batch.warp[lanes[mine]])
                clocks = [batch.clocks.release(barrier.cta, warp) for warp in warps]
                tx = total if bytes_expected else 0
                arrivals = int(mine.sum()) if bytes_expected else total
                drop = kind == "arrive_drop"
                clock = np.max(clocks, axis=0)
                barriers.arrive(barrier, arrivals, tx, clock, drop=drop, lane=first)

    return run


def _wait(inst: Inst, batch: Batch, barriers: Mbarriers) -> Run:
    p, address = batch.dest(inst.operands[0], "pred"), address_of(batch, inst.operands[1])
    parity = "parity" in inst.mods
    value = batch.source(inst.operands[2], "u32" if parity else "u64")
    guard = guard_of(inst, batch)
    here, following = batch.block_at[batch.binding.first], batch.binding.next

    def run(m: Mask) -> Any:
        batch.inst = inst
        chosen = guard(m)
        lanes = batch.index(chosen)
        if not len(lanes):
            return following
        places = barriers.flat(lanes, address(lanes))
        values = np.broadcast_to(value, batch.num_lanes)[lanes].astype(np.int64)
        stay = np.zeros(batch.num_lanes, bool)
        for flat, wanted in {*zip(places.tolist(), values.tolist(), strict=True)}:
            mine = lanes[(places == flat) & (values == wanted)]
            barrier = barriers.find(flat, int(mine[0]))
            if barriers.complete(barrier, wanted, parity):
                p[mine] = True
                for warp in np.unique(batch.warp[mine]):
                    batch.clocks.acquire(barrier.cta, warp, barrier.done)
                continue
            giving_up = barriers.may_fail[mine]
            p[mine[giving_up]] = False
            waiting = mine[~giving_up]
            stay[waiting] = True
            barriers.waits_for[waiting] = flat
            batch.parked[waiting] = True
        barriers.may_fail[lanes] = False
        return np.where(stay, here, following) if stay.any() else following

    return run
