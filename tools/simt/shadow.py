"""What is known about every granule of shared memory: written, in flight, by whom and when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tools.simt.core import Batch

WRITTEN, FLIGHT, DIRTY, MBARRIER = 1, 2, 4, 8
MANY, ALL = 63, 62  # read by several lanes of a warp, or by the warp as one (ldmatrix)


class Shadow:
    """Shadow of the shared memory of a batch; a granule is the kernel's smallest access."""

    def __init__(self, batch: Batch, num_bytes: int, granule: int) -> None:
        self.batch, self.shift = batch, granule.bit_length() - 1
        self.count = num_bytes >> self.shift
        self.flags = np.zeros(self.count, np.uint8)
        self.write_epoch = np.zeros(self.count, np.int32)
        self.write_who = np.zeros(self.count, np.int32)  # actor * 64 + lane
        # Last read of every actor: epoch * 64 + lane; atomics have stamps of their own.
        self.reads = np.zeros((batch.clocks.num_actors, self.count), np.int32)
        self.atomics: np.ndarray | None = None
        checks = batch.checks
        self.race = checks.race
        self.wrong = (FLIGHT if checks.in_flight else 0) | (MBARRIER if checks.mbarrier else 0)
        self.faults = checks.uninitialised == "fault"
        self.steps: dict[int, np.ndarray] = {}

    def reset(self) -> None:
        """Nothing written, nobody there."""
        for array in (self.flags, self.write_epoch, self.write_who, self.reads):
            array[:] = 0
        self.atomics = None

    def granules(self, flat: np.ndarray, num_bytes: int) -> np.ndarray:
        """Granules [n, k] of accesses that begin at flat bytes [n]."""
        first = flat >> self.shift
        if num_bytes not in self.steps:
            self.steps[num_bytes] = np.arange(max(1, num_bytes >> self.shift))
        return first[:, None] + self.steps[num_bytes]

    def report(
        self, kind: str, text: str, bad: np.ndarray, lanes: np.ndarray, at: np.ndarray
    ) -> None:
        """Raise for the first bad granule of `bad` [n, k]."""
        first = int(np.flatnonzero(bad.any(axis=1))[0])
        granule = int(at[first, int(np.flatnonzero(bad[first])[0])])
        offset = (granule << self.shift) % self.batch.shared.stride - self.batch.shared.base
        who = self.who(int(self.write_who[granule]))
        text = text.format(offset=offset, count=int(bad.any(axis=1).sum()), writer=who)
        self.batch.fault(kind, text, int(lanes[first]))

    def who(self, stamp: int) -> str:
        """The actor of a stamp, in words."""
        clocks, actor, lane = self.batch.clocks, stamp >> 6, stamp & 63
        if actor < clocks.num_warps:
            return f"warp {actor}" + ("" if lane >= 32 else f" lane {lane}")
        if actor < clocks.load:
            return f"wgmma of warpgroup {actor - clocks.num_warps}"
        return "a bulk copy into shared memory" if actor == clocks.load else "a bulk copy out of it"

    def check_flags(self, lanes: np.ndarray, at: np.ndarray, reading: bool) -> None:
        """Refuse bytes in flight, mbarriers and, for reads, what was never written."""
        wanted = WRITTEN if reading else 0
        found = self.flags[at] & np.uint8(self.wrong | wanted)
        if not (found != wanted).any():
            return
        if reading and not self.faults and not (found & ~np.uint8(WRITTEN)).any():
            missing = (found != WRITTEN).any(axis=1)
            self.batch.count("uninitialised shared reads", int(missing.sum()))
            return
        verb = "read" if reading else "write"
        flying = found & FLIGHT != 0
        if flying.any():
            text = verb + " of shared memory at offset {offset} with a copy still in flight "
            self.report("in-flight", text + "(missing wait)", flying, lanes, at)
        objects = found & MBARRIER != 0
        if objects.any():
            self.report("mbarrier", verb + " of an mbarrier at {offset}", objects, lanes, at)
        text = "read of uninitialised shared memory at offset {offset} by {count} lane(s)"
        self.report("uninitialised", text, found != wanted, lanes, at)

    def check_writes(self, lanes: np.ndarray, at: np.ndarray, verb: str, mine: bool = True) -> None:
        """Refuse granules whose last write is not ordered before these lanes."""
        batch = self.batch
        who = self.write_who[at]
        known = batch.known.take(batch.clock_row[lanes][:, None] + (who >> 6))
        bad = self.write_epoch[at] > known
        if bad.any() and mine:
            bad &= who != batch.who[lanes][:, None]
        if bad.any():
            self.report_race(bad, lanes, at, verb, "written by {writer}")

    def report_race(
        self, bad: np.ndarray, lanes: np.ndarray, at: np.ndarray, verb: str, what: str
    ) -> None:
        """Raise: between warps it is a race, inside a warp a hazard."""
        first = int(np.flatnonzero(bad.any(axis=1))[0])
        granule = at[first, int(np.flatnonzero(bad[first])[0])]
        inside = "written" in what and self.write_who[granule] >> 6 == self.batch.warp[lanes[first]]
        lane = f"lane {self.batch.lane[lanes[first]]} of warp {self.batch.warp[lanes[first]]}"
        if inside or "own warp" in what:
            text = f"inside a warp: {lane} {verb} offset {{offset}} {what} with no __syncwarp"
            self.report("hazard", text + " between", bad, lanes, at)
        text = f"shared-memory race: {lane} {verb} offset {{offset}} {what} with nothing between"
        self.report("race", text, bad, lanes, at)

    def check_reads(self, lanes: np.ndarray, at: np.ndarray, stamps: np.ndarray, verb: str) -> None:
        """Refuse granules with an access in `stamps` [actors, count] not ordered before."""
        batch = self.batch
        found = stamps[:, at.reshape(-1)]  # [actors, n * k]
        known = batch.clocks.known[batch.cta[lanes], batch.warp[lanes]]  # [n, actors]
        bad = (found >> 6) > np.repeat(known.T, at.shape[1], axis=1)
        if not bad.any():
            return
        own = np.repeat(batch.warp[lanes], at.shape[1])[None]
        lane = np.repeat(batch.lane[lanes], at.shape[1])[None]
        actors = np.arange(len(found))[:, None]
        mine = (actors == own) & (((found & 63) == lane) | ((found & 63) == ALL))
        bad &= ~mine
        if bad.any():
            actor = int(np.flatnonzero(bad.any(axis=1))[0])
            reader = self.who(actor << 6 | MANY)
            inside = (bad & (actors == own)).any()
            what = "another lane of its own warp has touched" if inside else f"touched by {reader}"
            self.report_race(bad.any(axis=0).reshape(at.shape), lanes, at, verb, what)

    def read(self, lanes: np.ndarray, at: np.ndarray, collective: bool = False) -> None:
        """Lanes read granules [n, k]; a collective read belongs to the warp, not to a lane."""
        self.check_flags(lanes, at, True)
        if not self.race:
            return
        self.check_writes(lanes, at, "reads")
        if self.atomics is not None:
            self.check_reads(lanes, at, self.atomics, "reads")
        batch = self.batch
        reader = ALL if collective else batch.lane[lanes]
        self.stamp(self.reads, lanes, at, (batch.own_epoch(lanes) + 1) << 6 | reader)

    def stamp(
        self, stamps: np.ndarray, lanes: np.ndarray, at: np.ndarray, stamp: np.ndarray
    ) -> None:
        """Note accesses; a granule that several lanes touched in one epoch gets MANY."""
        place = (self.batch.warp[lanes] * self.count)[:, None] + at
        flat = stamps.reshape(-1)
        new = np.broadcast_to(stamp[:, None], at.shape)
        old = flat.take(place)
        shared = ((old >> 6) == (new >> 6)) & (old != new)
        if shared.any():
            new = np.where(
                shared & ((old & 63) != ALL), np.where(new & 63 == ALL, old, new | MANY), new
            )
        flat[place] = new
        other = flat.take(place) != new
        if other.any():
            flat[place[other]] = new[other] | MANY

    def write(self, lanes: np.ndarray, at: np.ndarray) -> bool:
        """Lanes write granules [n, k]; returns whether two lanes wrote one granule."""
        self.check_flags(lanes, at, False)
        self.check_free(lanes, at, "overwrites")
        return self.mark(lanes, at)

    def check_free(self, lanes: np.ndarray, at: np.ndarray, verb: str) -> None:
        """Refuse to write over what somebody may still touch."""
        if self.race:
            self.check_writes(lanes, at, verb)
            self.check_reads(lanes, at, self.reads, verb)
            if self.atomics is not None:
                self.check_reads(lanes, at, self.atomics, verb)

    def mark(self, lanes: np.ndarray, at: np.ndarray) -> bool:
        """Note a generic write that is done."""
        batch = self.batch
        self.flags[at] = WRITTEN | DIRTY
        who = batch.who[lanes][:, None]
        self.write_epoch[at] = batch.own_epoch(lanes)[:, None] + 1
        self.write_who[at] = who
        return bool((self.write_who[at] != who).any())

    def atomic(self, lanes: np.ndarray, at: np.ndarray) -> None:
        """Lanes update granules atomically: unordered among themselves only."""
        self.check_flags(lanes, at, True)
        self.flags[at] |= DIRTY
        if not self.race:
            return
        if self.atomics is None:
            self.atomics = np.zeros_like(self.reads)
        self.check_writes(lanes, at, "updates")
        self.check_reads(lanes, at, self.reads, "updates")
        batch = self.batch
        self.stamp(self.atomics, lanes, at, (batch.own_epoch(lanes) + 1) << 6 | batch.lane[lanes])

    def begin_flight(self, lanes: np.ndarray, at: np.ndarray) -> None:
        """A copy into granules is issued by lanes."""
        self.check_flags(lanes, at, False)
        self.check_free(lanes, at, "copies over")
        self.flags[at] |= FLIGHT

    def async_written(self, at: np.ndarray, actor: int, epoch: int) -> None:
        """A bulk copy into granules is complete."""
        self.flags[at] = WRITTEN
        self.write_epoch[at] = epoch
        self.write_who[at] = actor << 6 | MANY

    def async_read(self, lanes: np.ndarray, at: np.ndarray, actor: Any, epoch: Any) -> None:
        """An asynchronous reader issued by lanes will read granules [n, k] until it is waited for.

        The writes must be ordered before the lanes, their own included, and made visible to the
        asynchronous proxy.
        """
        self.check_flags(lanes, at, True)
        if self.batch.checks.proxy:
            dirty = self.flags[at] & DIRTY != 0
            if dirty.any():
                text = "asynchronous read of offset {offset}, written by {writer} with no "
                self.report("proxy", text + "fence.proxy.async between", dirty, lanes, at)
        if self.race:
            self.check_writes(lanes, at, "reads asynchronously")
            self.reads[actor, at] = np.asarray(epoch) << 6 | MANY

    def fence_proxy(self, ctas: np.ndarray, warps: np.ndarray) -> None:
        """Make the generic writes that warps know of visible to the asynchronous proxy."""
        per_cta = self.count // self.batch.num_ctas
        known = self.batch.clocks.known
        for cta in np.unique(ctas):
            part = slice(int(cta) * per_cta, (int(cta) + 1) * per_cta)
            dirty = np.flatnonzero(self.flags[part] & DIRTY) + part.start
            writer, epoch = self.write_who[dirty] >> 6, self.write_epoch[dirty]
            mine = warps[ctas == cta]
            clear = np.isin(writer, mine) | (epoch <= known[cta, mine].max(axis=0)[writer])
            self.flags[dirty[clear]] &= ~np.uint8(DIRTY)
