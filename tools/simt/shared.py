"""Shared memory of a batch of CTAs: bytes, bounds, and the shadow behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tools.simt.numbers import UINT
from tools.simt.program import TYPE_BYTES, Inst, Kernel, Vec
from tools.simt.shadow import Shadow

if TYPE_CHECKING:
    from tools.simt.core import Batch

BASE = 1024  # the first KiB belongs to the driver, and TMA tiles want such an alignment


def smallest_access(kernel: Kernel) -> int:
    """Bytes of the kernel's smallest access that may be to shared memory, at most 4."""
    sizes = [4]
    for inst in kernel.insts:
        spaces = {mod.split(":")[0] for mod in inst.mods} & {"global", "local", "param", "const"}
        if inst.op in ("ld", "st", "atom", "red") and not spaces:
            sizes.append(TYPE_BYTES[inst.type])
    return max(1, min(sizes))


class Shared:
    """Shared memory; addresses begin at BASE in every CTA."""

    def __init__(self, batch: Batch, num_bytes: int) -> None:
        self.batch, self.num_bytes, self.base = batch, num_bytes, BASE
        self.stride = -(-(BASE + num_bytes) // 1024) * 1024
        self.bytes = np.zeros(self.stride * batch.num_ctas, np.uint8)
        self.cta_base = batch.cta * self.stride
        self.rows: dict[tuple[int, int], np.ndarray] = {}
        self.shadow: Shadow | None = None
        if num_bytes and batch.checks.shadow:
            self.shadow = Shadow(batch, len(self.bytes), smallest_access(batch.kernel))

    def reset(self) -> None:
        """Fill with NaN and forget who wrote."""
        self.bytes[:] = 0xFF
        if self.shadow:
            self.shadow.reset()

    def view(self, width: int, count: int = 1) -> np.ndarray:
        """The bytes as rows of `count` unsigned integers of `width` bytes."""
        if (width, count) not in self.rows:
            flat = self.bytes.view(UINT[width])
            self.rows[width, count] = flat if count == 1 else flat.reshape(-1, count)
        return self.rows[width, count]

    def locate(self, lanes: np.ndarray, addresses: np.ndarray, num_bytes: int) -> np.ndarray:
        """Flat byte offsets [n] of addresses [n], checked for bounds and alignment."""
        at = addresses.astype(np.int64)
        checks, batch = self.batch.checks, self.batch
        if checks.bounds:
            bad = (at < BASE) | (at + num_bytes > BASE + self.num_bytes)
            if bad.any():
                first = int(np.flatnonzero(bad)[0])
                batch.fault(
                    "bounds",
                    f"out-of-bounds shared access by {int(bad.sum())} lane(s); first at offset "
                    f"{int(at[first]) - BASE} of {self.num_bytes} bytes",
                    int(lanes[first]),
                )
        else:
            at = np.clip(at, 0, self.stride - num_bytes)
        if checks.misaligned and num_bytes > 1:
            bad = at & (num_bytes - 1) != 0
            if bad.any():
                first = int(np.flatnonzero(bad)[0])
                text = f"shared access of {num_bytes} bytes at offset {int(at[first]) - BASE}"
                batch.fault("misaligned", text, int(lanes[first]))
        return self.cta_base[lanes] + at

    def read(self, lanes: np.ndarray, addresses: np.ndarray, width: int, count: int) -> np.ndarray:
        """Values [n, count] at addresses [n]."""
        flat = self.locate(lanes, addresses, width * count)
        if self.shadow:
            self.shadow.read(lanes, self.shadow.granules(flat, width * count))
        if self.batch.profile:
            self.count_passes("load", lanes, flat, width * count)
        rows = self.view(width, count).take(flat // (width * count), axis=0)
        return rows.reshape(-1, count)

    def write(self, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        """Store values [n, count] at addresses [n]."""
        width, count = values.dtype.itemsize, values.shape[1]
        flat = self.locate(lanes, addresses, width * count)
        twice = False
        if self.shadow:
            twice = self.shadow.write(lanes, self.shadow.granules(flat, width * count))
        if self.batch.profile:
            self.count_passes("store", lanes, flat, width * count)
        place = flat // (width * count)
        rows = self.view(width, count)
        rows[place] = values if count > 1 else values[:, 0]
        if twice and self.batch.checks.race and self.batch.checks.same_store:
            kept = rows[place].reshape(-1, count) != values
            if kept.any():
                first = int(np.flatnonzero(kept.any(axis=1))[0])
                offset = int(flat[first]) % self.stride - BASE
                text = f"two lanes write different values to offset {offset} at once"
                self.batch.fault("race", text, int(lanes[first]))

    def count_passes(self, kind: str, lanes: np.ndarray, flat: np.ndarray, num_bytes: int) -> None:
        """Passes of a warp's access through the 32 banks, and the fewest possible."""
        words = max(1, num_bytes // 4)
        batch = self.batch
        phase = batch.lane[lanes] * words // 32
        group = (lanes // 32) * words + phase
        word = (flat // 4)[:, None] + np.arange(words)
        keys = np.unique(group[:, None].astype(np.int64) * (len(self.bytes) // 4) + word)
        bank = keys % (len(self.bytes) // 4) % 32
        slot, counts = np.unique(keys // (len(self.bytes) // 4) * 32 + bank, return_counts=True)
        worst = np.zeros(int(group.max()) + 1, np.int64)
        np.maximum.at(worst, slot // 32, counts)
        batch.count(f"shared passes, {kind}", int(worst.sum()))
        batch.count(f"shared passes, {kind}, ideal", len(np.unique(group)))


def vector_width(operand: Any) -> int:
    """Registers of a vector operand."""
    return len(operand.items) if isinstance(operand, Vec) else 1


def is_shared(inst: Inst) -> bool:
    """Whether an instruction names shared memory."""
    return any(mod.split(":")[0] == "shared" for mod in inst.mods)
