"""Vector clocks: what each actor of a CTA knows to have happened before it.

Actors are the warps, one reader per warpgroup (wgmma reads shared memory later than it is issued)
and two for bulk copies (into and out of shared memory). An access is stamped with its actor's
current epoch; another actor may touch the same bytes only when its clock has reached that epoch.
An actor's own entry holds its last *finished* epoch, so that accesses of other lanes of the same
warp since the last synchronisation look unordered too.

Source: Flanagan and Freund, "FastTrack", PLDI 2009.
"""

from __future__ import annotations

import numpy as np


class Clocks:
    """The clocks of a batch of CTAs: `known[cta, actor, other]`."""

    def __init__(self, num_ctas: int, num_warps: int) -> None:
        self.num_warps = num_warps
        self.num_groups = -(-num_warps // 4)
        self.load = num_warps + self.num_groups
        self.store = self.load + 1
        self.num_actors = self.store + 1
        self.known = np.zeros((num_ctas, self.num_actors, self.num_actors), np.int32)
        self.own = np.einsum("caa->ca", self.known)  # a view of the diagonals

    def reset(self) -> None:
        """Back to the beginning of a kernel."""
        self.known[:] = 0

    def release(self, cta: int, actor: int) -> np.ndarray:
        """Finish the actor's epoch; returns all it knows, that epoch included."""
        self.own[cta, actor] += 1
        return self.known[cta, actor].copy()

    def acquire(self, cta: int, actor: int, clock: np.ndarray) -> None:
        """Learn a released clock."""
        self.own[cta, actor] += 1  # the other lanes' accesses so far are ordered as well
        np.maximum(self.known[cta, actor], clock, out=self.known[cta, actor])

    def finish_epoch(self, ctas: np.ndarray, actors: np.ndarray) -> None:
        """Order the lanes of warps among themselves (bar.warp.sync)."""
        self.own[ctas, actors] += 1

    def barrier(self, cta: int, arriving: np.ndarray, waiting: np.ndarray) -> None:
        """Join the clocks of the warps that arrived into those that waited."""
        known = self.known[cta]
        self.own[cta, arriving] += 1
        known[waiting] = np.maximum(known[waiting], known[arriving].max(axis=0))

    def asynchronous(self, cta: int, actor: int) -> int:
        """Begin an epoch of an asynchronous actor; returns its stamp."""
        self.own[cta, actor] += 1
        return int(self.own[cta, actor])

    def completed(self, cta: int, actor: int, of: int, epoch: int) -> None:
        """Let `actor` know that an asynchronous actor has done all up to an epoch."""
        self.known[cta, actor, of] = max(self.known[cta, actor, of], epoch)
