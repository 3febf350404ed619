"""Which block runs next, on which lanes; and what to say when none can."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tools.simt.faults import Fault

if TYPE_CHECKING:
    from tools.simt.core import Batch, Block

MAX_IDLE_ROUNDS = 64  # wake-ups in vain of waiting lanes before it is called a deadlock
TURN = 512  # blocks before lanes other than those at the lowest counter get a turn
NOWHERE = np.int32(2**31 - 1)


def run_batch(batch: Batch, rng: np.random.Generator | None) -> None:
    """Run a batch to its end, in lockstep or one random warp at a time."""
    held = np.zeros(batch.num_lanes, bool)  # at a block whose other lanes are missing
    idle = Idle(batch)
    turn = 0
    while batch.live.any():
        ready = batch.live & ~batch.parked
        at_once = rng is None and not held.any() and same_place(batch, ready)
        if at_once is not False:
            run_together(batch, int(at_once))
            continue
        ready &= ~held
        if not ready.any():
            held[:] = False
            idle.wake()
            continue
        turn += 1
        chosen, place = choose(batch, ready, rng, turn % TURN == TURN - 1)
        block = batch.blocks[place] if place < len(batch.blocks) else None
        if block is not None and block.needs is not None:
            arrived = converged(batch, block, chosen)
            held |= chosen & ~arrived
            chosen = chosen & arrived
            if not chosen.any():
                continue
        execute(batch, block, chosen)
        held[:] = False


def same_place(batch: Batch, ready: np.ndarray) -> Any:
    """The counter of all live lanes, if it is one and none is parked; else False."""
    if batch.parked.any():
        return False
    places = batch.pc[ready]
    first = places[0]
    return first if (places == first).all() else False


def run_together(batch: Batch, place: int) -> None:
    """Run blocks while all live lanes stay together."""
    everyone = True if batch.live.all() else batch.live.copy()
    warps = batch.num_lanes // 32
    if everyone is not True:
        warps = int(batch.live.reshape(-1, 32).any(axis=1).sum())
    blocks, end = batch.blocks, len(batch.blocks)
    while place < end:
        block = blocks[place]
        block.count += warps
        batch.spend()
        for run in block.runs:
            run(everyone)
        if block.end is None:
            place = block.next
            continue
        after = block.end(everyone)
        after = block.next if after is None else after
        np.copyto(batch.pc, after, where=everyone)
        if (
            not isinstance(after, int)
            or batch.parked.any()
            or (not batch.live.all() and everyone is True)
        ):
            return
        if everyone is not True and (batch.live != everyone).any():
            return
        place = after
    batch.pc[everyone if everyone is not True else slice(None)] = place
    leave(batch, batch.live.copy())


def execute(batch: Batch, block: Block | None, chosen: np.ndarray) -> None:
    """Run one block on some lanes."""
    if block is None:
        leave(batch, chosen)
        return
    block.count += int(chosen.reshape(-1, 32).any(axis=1).sum())
    batch.spend()
    m = True if chosen.all() else chosen
    for run in block.runs:
        run(m)
    after = None if block.end is None else block.end(m)
    np.copyto(batch.pc, block.next if after is None else after, where=chosen)


def leave(batch: Batch, m: np.ndarray) -> None:
    """Lanes are at the end of the kernel."""
    batch.live &= ~m
    batch.events += 1
    for left in batch.on_exit:
        left(m)


def choose(
    batch: Batch, ready: np.ndarray, rng: np.random.Generator | None, other: bool
) -> tuple[np.ndarray, int]:
    """The lanes to run and their block."""
    if rng is None:
        places = batch.pc[ready]
        # Now and then the highest counter: a spinning lane must not starve the one it waits for.
        place = places.max() if other else places.min()
        return ready & (batch.pc == place), int(place)
    warps = np.flatnonzero(ready.reshape(-1, 32).any(axis=1))
    warp = int(rng.choice(warps))
    unit = np.zeros(batch.num_lanes, bool)
    unit[warp * 32 : warp * 32 + 32] = True
    places = np.unique(batch.pc[ready & unit])
    place = int(rng.choice(places) if rng.random() < 0.25 else places[0])
    if place < len(batch.blocks) and batch.blocks[place].needs == "group":
        cta, inside = divmod(warp, batch.num_warps)
        first = cta * batch.num_warps + inside // 4 * 4
        unit[first * 32 : (first + 4) * 32] = True
    return ready & unit & (batch.pc == place), place


def bits_of_warps(m: np.ndarray) -> np.ndarray:
    """A bool per lane -> 32 bits per warp."""
    return np.packbits(m.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32)[:, 0]


def converged(batch: Batch, block: Block, here: np.ndarray) -> np.ndarray:
    """Which of the lanes at a block have with them all lanes that it needs."""
    missing = batch.live & ~here
    if block.mask is None:
        size = 32 if block.needs == "warp" else 128
        gone = missing.reshape(-1, size).any(axis=1)
        return np.repeat(~gone, size)
    absent = np.repeat(bits_of_warps(missing), 32)
    return block.mask & absent == 0


class Idle:
    """What to do when every lane waits: let waits fail, and at last report a deadlock."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.rounds = batch, 0
        self.events = -1

    def wake(self) -> None:
        """Let lanes that wait for an mbarrier see that it is not complete, or give up."""
        batch = self.batch
        self.rounds = self.rounds + 1 if batch.events == self.events else 0
        self.events = batch.events
        mbarriers = batch.parts.get("Mbarriers")
        waiting = mbarriers.waiting() if mbarriers else None
        if waiting is None or not waiting.any() or self.rounds >= MAX_IDLE_ROUNDS:
            raise Fault("deadlock", describe(batch))
        mbarriers.let_fail(waiting)


def describe(batch: Batch) -> str:
    """Where every warp stands, and the state of the barriers."""
    lines = ["no lane can go on"]
    for place in np.unique(batch.pc[batch.live])[:8]:
        m = batch.live & (batch.pc == place)
        first = int(np.flatnonzero(m)[0])
        block = batch.blocks[min(place, len(batch.blocks) - 1)]
        before = batch.blocks[place - 1].insts[-1] if place else block.insts[0]
        parked = bool(batch.parked[first])
        inst = before if parked and before.op in ("bar", "barrier") else block.insts[0]
        lines.append(f"{int(m.sum())} lane(s), first {batch.name_lane(first)}, wait at {inst}")
    for part in batch.parts.values():
        if hasattr(part, "describe"):
            lines.extend(part.describe())
    return "\n    ".join(lines)
