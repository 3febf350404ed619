"""Accesses to global memory: bounds, alignment, what was written, and races between CTAs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tools.simt.program import TYPE_BYTES, Kernel

if TYPE_CHECKING:
    from tools.simt.core import Batch

SECTOR = 32  # bytes that travel at least
ATOMIC = 61  # in place of a lane: an atomic access, unordered only with plain ones
NOBODY, SEVERAL = -1, -2


class GlobalRaces:
    """Who wrote and read each granule of the arena last, through a whole launch."""

    def __init__(self, num_bytes: int, kernel: Kernel) -> None:
        sizes = [TYPE_BYTES[i.type] for i in kernel.insts if i.op in ("ld", "st", "atom", "red")]
        self.shift = max(1, min([4, *sizes])).bit_length() - 1
        count = num_bytes >> self.shift
        self.write_cta = np.full(count, NOBODY, np.int32)
        self.write_epoch = np.zeros(count, np.int32)
        self.write_who = np.zeros(count, np.int32)
        self.write_turn = np.zeros(count, np.int32)
        self.read_cta = np.full(count, NOBODY, np.int32)
        self.read_epoch = np.zeros(count, np.int32)
        self.read_who = np.zeros(count, np.int32)
        # CTAs that synchronise through atomics: what each has released and knows of the others.
        self.turn: dict[int, int] = {}
        self.knows: dict[int, dict[int, int]] = {}
        self.released: dict[int, dict[int, int]] = {}

        self.fenced: dict[tuple[int, int], dict[int, int]] = {}
        self.seen: dict[tuple[int, int], dict[int, int]] = {}

    def fence(self, cta: int, thread: int) -> None:
        """A thread's later atomics release what came before, its earlier ones have acquired."""
        knows = self.knows.setdefault(cta, {})
        join(knows, self.seen.pop((cta, thread), {}))
        self.turn[cta] = self.turn.get(cta, 0) + 1
        self.fenced[cta, thread] = {**knows, cta: self.turn[cta]}

    def meet(self, cta: int, thread: int, address: int, acquires: bool, releases: bool) -> None:
        """A thread reads an address where others may have released, and writes it."""
        there = self.released.setdefault(address, {})
        if acquires:
            join(self.knows.setdefault(cta, {}), there)
        join(self.seen.setdefault((cta, thread), {}), there)
        if releases:
            self.fence(cta, thread)
        join(there, self.fenced.get((cta, thread), {}))


def join(clock: dict[int, int], other: dict[int, int]) -> None:
    """The later of two turns of every CTA."""
    for cta, turn in other.items():
        clock[cta] = max(clock.get(cta, 0), turn)


class GlobalMemory:
    """The arena as the lanes of a batch see it."""

    def __init__(self, batch: Batch, races: GlobalRaces | None) -> None:
        self.batch, self.device, self.races = batch, batch.device, races
        self.fresh = batch.checks.uninitialised == "fault"
        self.touched: dict[str, np.ndarray] = {}

    def locate(self, lanes: np.ndarray, addresses: np.ndarray, num_bytes: int) -> np.ndarray:
        """Byte offsets into the arena, checked."""
        batch, checks = self.batch, self.batch.checks
        offsets = self.device.offsets_of(addresses)
        bad = self.device.bad(offsets, num_bytes) if checks.bounds else None
        if bad is not None and bad.any():
            first = int(np.flatnonzero(bad)[0])
            where = self.device.describe(int(offsets[first]))
            text = f"out-of-bounds global access by {int(bad.sum())} lane(s); first at {where}"
            batch.fault("bounds", text, int(lanes[first]))
        if bad is None:
            offsets = np.clip(offsets, 0, len(self.device.bytes) - num_bytes)
        if checks.misaligned and num_bytes > 1 and (offsets & (num_bytes - 1)).any():
            first = int(np.flatnonzero(offsets & (num_bytes - 1))[0])
            where = self.device.describe(int(offsets[first]))
            batch.fault("misaligned", f"access of {num_bytes} bytes at {where}", int(lanes[first]))
        return offsets

    def read(self, lanes: np.ndarray, addresses: np.ndarray, width: int, count: int) -> np.ndarray:
        """Values [n, count] at addresses [n]."""
        num_bytes = width * count
        offsets = self.locate(lanes, addresses, num_bytes)
        if self.fresh:
            self.check_written(lanes, offsets, num_bytes)
        if self.races:
            self.check_read(lanes, offsets, num_bytes)
        if self.batch.profile:
            self.count_sectors("load", lanes, offsets, num_bytes)
        return self.device.view(width, count).take(offsets // num_bytes, axis=0).reshape(-1, count)

    def write(self, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        """Store values [n, count] at addresses [n]."""
        width, count = values.dtype.itemsize, values.shape[1]
        offsets = self.locate(lanes, addresses, width * count)
        if self.races:
            self.check_write(lanes, offsets, width * count, values)
        if self.batch.profile:
            self.count_sectors("store", lanes, offsets, width * count)
            self.batch.move(values.nbytes)
        at = offsets // (width * count)
        self.device.view(width, count)[at] = values if count > 1 else values[:, 0]
        self.mark_written(offsets, width * count)

    def meet(self, lanes: np.ndarray, addresses: np.ndarray, mods: tuple[str, ...]) -> None:
        """Lanes synchronise, or try to, with whoever uses the same addresses atomically."""
        acquires = "acquire" in mods or "acq_rel" in mods
        releases = "release" in mods or "acq_rel" in mods
        for lane, address in zip(lanes, addresses, strict=True):
            cta, thread = int(self.batch.cta_number[lane]), int(self.batch.thread[lane])
            self.races.meet(cta, thread, int(address), acquires, releases)

    def read_strongly(
        self, lanes: np.ndarray, addresses: np.ndarray, width: int, count: int, mods: Any
    ) -> np.ndarray:
        """A volatile, relaxed or acquiring load: no race with other strong accesses."""
        races, self.races = self.races, None
        rows = self.read(lanes, addresses, width, count)
        self.races = races
        if races:
            self.meet(lanes, addresses, mods)
        return rows

    def write_strongly(
        self, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray, mods: Any
    ) -> None:
        """A volatile, relaxed or releasing store."""
        races, self.races = self.races, None
        self.write(lanes, addresses, values)
        self.races = races
        if races:
            num_bytes = values.dtype.itemsize * values.shape[1]
            self.check_write(lanes, self.locate(lanes, addresses, num_bytes), num_bytes, None)
            self.meet(lanes, addresses, mods)

    def mark_written(self, offsets: np.ndarray, num_bytes: int) -> None:
        """Note that bytes hold something now."""
        self.device.written[offsets[:, None] + np.arange(num_bytes)] = True

    def check_written(self, lanes: np.ndarray, offsets: np.ndarray, num_bytes: int) -> None:
        """Refuse to read what nobody wrote."""
        written = self.device.written
        ok = written[offsets] & written[offsets + (num_bytes - 1)]
        if not ok.all():
            first = int(np.flatnonzero(~ok)[0])
            where = self.device.describe(int(offsets[first]))
            text = f"read of uninitialised global memory by {int((~ok).sum())} lane(s), at {where}"
            self.batch.fault("uninitialised", text, int(lanes[first]))

    # Races.

    def granules(self, offsets: np.ndarray, num_bytes: int) -> np.ndarray:
        """Granules [n, k] of accesses."""
        steps = np.arange(max(1, num_bytes >> self.races.shift))
        return (offsets >> self.races.shift)[:, None] + steps

    def refuse(
        self, bad: np.ndarray, lanes: np.ndarray, offsets: np.ndarray, verb: str, what: str
    ) -> None:
        """Raise for the first bad access."""
        first = int(np.flatnonzero(bad.any(axis=1))[0])
        where = self.device.describe(int(offsets[first]))
        text = f"global-memory race: {verb} {where}, {what} with nothing between"
        self.batch.fault("race", text, int(lanes[first]))

    def unordered(
        self, lanes: np.ndarray, cta: np.ndarray, epoch: np.ndarray, who: np.ndarray, turn: Any
    ) -> np.ndarray:
        """Which stamps [n, k] are not ordered before the lanes."""
        batch, races = self.batch, self.races
        mine = batch.cta_number[lanes][:, None]
        other = (cta != mine) & (cta != NOBODY)
        if other.any() and races.released and turn is not None:
            for pair in {*zip(*np.nonzero(other), strict=True)}:
                knows = races.knows.get(int(mine[pair[0], 0]), {})
                other[pair] = knows.get(int(cta[pair]), -1) < turn[pair]
        elif races.released:
            other[:] = False
        known = batch.known.take(batch.clock_row[lanes][:, None] + (who >> 6), mode="clip")
        inside = (cta == mine) & (epoch > known) & (who != batch.who[lanes][:, None])
        return other | inside

    def check_read(self, lanes: np.ndarray, offsets: np.ndarray, num_bytes: int) -> None:
        """Refuse to read an unordered write; remember the reader."""
        races, batch = self.races, self.batch
        at = self.granules(offsets, num_bytes)
        cta = races.write_cta[at]
        if (cta != NOBODY).any():
            bad = self.unordered(
                lanes, cta, races.write_epoch[at], races.write_who[at], races.write_turn[at]
            )
            if bad.any():
                self.refuse(bad, lanes, offsets, "reads", "written by another thread")
        mine = batch.cta_number[lanes][:, None].astype(np.int32)
        before = races.read_cta[at]
        races.read_cta[at] = np.where((before == mine) | (before == NOBODY), mine, SEVERAL)
        races.read_epoch[at] = batch.own_epoch(lanes)[:, None] + 1
        races.read_who[at] = batch.who[lanes][:, None]

    def check_write(
        self, lanes: np.ndarray, offsets: np.ndarray, num_bytes: int, values: np.ndarray | None
    ) -> None:
        """Refuse to overwrite an unordered access; remember the writer. None: an atomic."""
        races, batch = self.races, self.batch
        at = self.granules(offsets, num_bytes)
        cta, who = races.write_cta[at], races.write_who[at]
        atomic = values is None
        if (cta != NOBODY).any():
            bad = self.unordered(lanes, cta, races.write_epoch[at], who, races.write_turn[at])
            if atomic:
                bad &= (who & 63) != ATOMIC
            if bad.any():
                self.refuse(bad, lanes, offsets, "overwrites", "written by another thread")
        cta = races.read_cta[at]
        if (cta != NOBODY).any():
            bad = self.unordered(lanes, cta, races.read_epoch[at], races.read_who[at], None)
            if bad.any():
                self.refuse(bad, lanes, offsets, "overwrites", "read by another thread")
        mine = batch.who[lanes][:, None]
        races.write_cta[at] = batch.cta_number[lanes][:, None]
        races.write_epoch[at] = batch.own_epoch(lanes)[:, None] + 1
        races.write_who[at] = (mine & ~63 | ATOMIC) if atomic else mine
        if races.turn:
            turns = [races.turn.get(int(c), 0) + 1 for c in batch.cta_number[lanes]]
            races.write_turn[at] = np.array(turns, np.int32)[:, None]
        elif not atomic:
            races.write_turn[at] = 1

    def count_sectors(
        self, kind: str, lanes: np.ndarray, offsets: np.ndarray, num_bytes: int
    ) -> None:
        """Sectors of every request of a warp, and the bytes asked for."""
        warps = lanes // 32
        first, last = offsets // SECTOR, (offsets + num_bytes - 1) // SECTOR
        keys = np.concatenate([warps * (1 << 40) + first, warps * (1 << 40) + last])
        direction = "load" if kind == "load" else "store"
        touched = self.touched.setdefault(
            direction, np.zeros(len(self.device.bytes) // SECTOR + 1, bool)
        )
        touched[first] = True
        touched[last] = True
        self.batch.count(f"global requests, {kind}", len(np.unique(warps)))
        self.batch.count(f"global sectors, {kind}", len(np.unique(keys)))
        self.batch.count(f"global bytes, {kind}", len(lanes) * num_bytes)

    def count_touched(self) -> None:
        """Count the bytes of every sector that a launch has touched at all."""
        for direction, touched in self.touched.items():
            self.batch.count(f"touched bytes, {direction}", int(touched.sum()) * SECTOR)
