"""Bulk copies: TMA tiles and plain blocks, into shared memory and out of it.

Into shared memory: the bytes arrive at the first mbarrier wait that needs them. Out of it: they
are read when the thread waits for its bulk group. Tensor maps are our own encoding of
(array, box, swizzle).
Source: PTX ISA manual, sections 5.5 (tensors) and 9.7.9.27.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.simt.access import address_of
from tools.simt.core import Batch, Mask, Run
from tools.simt.mbarrier import Event, Mbarriers
from tools.simt.memory import GLOBAL_BASE, SHARED_WINDOW, Device, Output
from tools.simt.program import Imm, Inst
from tools.simt.shadow import DIRTY

MAGIC = 0x70616D726F736E74


class TensorMap:
    """A tensor in global memory and the box that one copy moves.

    Args:
        array: contiguous, outermost dimension first; bfloat16 as a tensor or as uint16.
        box: elements of a copy in every dimension, outermost first.
        swizzle: 0, 32, 64 or 128 bytes.
    """

    def __init__(self, array: Any, box: Sequence[int], swizzle: int = 0) -> None:
        self.array, self.box, self.swizzle = array, tuple(box), swizzle
        inner = array.array if isinstance(array, Output) else array
        self.shape = tuple(inner.shape)
        self.size = inner.dtype.itemsize
        if len(self.box) != len(self.shape) or max(self.box) > 256:
            raise ValueError(f"simt: box {self.box} of an array of shape {self.shape}")
        if swizzle and self.box[-1] * self.size > swizzle:
            raise ValueError(f"simt: rows of {self.box[-1] * self.size} bytes, swizzle {swizzle}")
        self.address = 0

    def encode(self, device: Device) -> bytes:
        """128 bytes that stand for the map on a device."""
        self.address = device.pointer(self.array)
        device.tensor_maps.append(self)
        return struct.pack("<QQ", MAGIC, len(device.tensor_maps) - 1).ljust(128, b"\0")

    @property
    def num_bytes(self) -> int:
        """Bytes of a box."""
        return int(np.prod(self.box)) * self.size

    def offsets(self, corner: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Arena offsets of a box's elements, and which are inside the tensor."""
        offset, inside = np.zeros(1, np.int64), np.ones(1, bool)
        stride = self.size
        strides = []
        for extent in reversed(self.shape):
            strides.append(stride)
            stride *= extent
        parts = zip(self.box, self.shape, reversed(strides), corner, strict=True)
        for box, extent, step, begin in parts:
            at = begin + np.arange(box)
            offset = (offset[:, None] + at * step).reshape(-1)
            inside = (inside[:, None] & ((at >= 0) & (at < extent))).reshape(-1)
        return offset + (self.address - GLOBAL_BASE), inside


def swizzled(addresses: np.ndarray, swizzle: int) -> np.ndarray:
    """Where a swizzle puts bytes: address bits from 4 are flipped by those from 7."""
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    return addresses ^ ((addresses >> 7 & mask) << 4)


@dataclass
class Store:
    """A copy out of shared memory that has been issued."""

    inst: Inst | None
    lane: int
    flat: np.ndarray  # of every element
    offsets: np.ndarray  # into the arena
    size: int
    epoch: int


@dataclass
class Group:
    """The bulk groups of a thread."""

    open: list[Store] = field(default_factory=list)
    closed: list[list[Store]] = field(default_factory=list)


class BulkCopies:
    """Bulk copies of a batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.mbarriers = batch.part(Mbarriers)
        self.groups: dict[int, Group] = {}
        batch.on_reset.append(self.groups.clear)
        batch.on_exit.append(self.check_exit)

    def map_at(self, address: int, lane: int) -> TensorMap:
        """The tensor map at a generic address."""
        begin = address - GLOBAL_BASE
        magic, number = struct.unpack("<QQ", self.batch.device.bytes[begin : begin + 16].tobytes())
        if magic != MAGIC:
            self.batch.fault("bounds", "no tensor map is there", lane)
        return self.batch.device.tensor_maps[number]

    def shared_places(self, lane: int, address: int, num_bytes: int, align: int) -> int:
        """The flat offset of a block of shared memory, checked."""
        if address >= SHARED_WINDOW:
            address -= SHARED_WINDOW
        if address % align and self.batch.checks.misaligned:
            self.batch.fault("misaligned", f"bulk copy to {address:#x}, not {align} bytes", lane)
        ends = np.array([address, address + num_bytes - 16], np.int64)
        return int(self.batch.shared.locate(np.array([lane, lane]), ends, 16)[0])

    def granules(self, flat: int, num_bytes: int) -> np.ndarray:
        """Granules [1, k] of a block."""
        return self.batch.shared.shadow.granules(np.arange(flat, flat + num_bytes, 16), 16).reshape(
            1, -1
        )

    def load(self, lane: int, flat: int, at: np.ndarray, data: np.ndarray, mbarrier: int) -> None:
        """Issue a copy of data (elements) to flat offsets `at`, signalled to an mbarrier."""
        batch, shared = self.batch, self.batch.shared
        barrier = self.mbarriers.find(mbarrier, lane)
        num_bytes, granules = data.nbytes, None
        if shared.shadow:
            granules = self.granules(flat, num_bytes)
            if batch.checks.proxy and (shared.shadow.flags[granules] & DIRTY).any():
                dirty = shared.shadow.flags[granules] & DIRTY != 0
                text = "bulk copy over offset {offset}, written by {writer} with no "
                text += "fence.proxy.async between"
                shared.shadow.report("proxy", text, dirty, np.array([lane]), granules)
            shared.shadow.begin_flight(np.array([lane]), granules)
        batch.count("bulk bytes, load", num_bytes)

        def deliver() -> None:
            clocks, cta = batch.clocks, barrier.cta
            shared.view(data.itemsize)[at // data.itemsize] = data
            epoch = clocks.asynchronous(cta, clocks.load)
            if granules is not None:
                shared.shadow.async_written(granules, clocks.load, epoch)
            clock = np.zeros(clocks.num_actors, np.int32)
            clock[clocks.load] = epoch
            self.mbarriers.complete_tx(barrier, num_bytes, clock)

        barrier.events.append(Event(deliver, batch.inst, lane))

    def store(self, lane: int, flat: int, num_bytes: int, elements: Any) -> None:
        """Issue a copy out; elements: (flat offsets, arena offsets, size)."""
        batch, shared = self.batch, self.batch.shared
        clocks = batch.clocks
        epoch = clocks.asynchronous(int(batch.cta[lane]), clocks.store)
        if shared.shadow:
            at = self.granules(flat, num_bytes)
            shared.shadow.async_read(np.array([lane]), at, clocks.store, epoch)
        batch.count("bulk bytes, store", num_bytes)
        group = self.groups.setdefault(lane, Group())
        group.open.append(Store(batch.inst, lane, *elements, epoch))

    def commit(self, m: Mask) -> None:
        """Close the open bulk group of every lane."""
        for lane in self.batch.index(m):
            group = self.groups.setdefault(int(lane), Group())
            group.closed.append(group.open)
            group.open = []

    def wait(self, m: Mask, newest: int) -> None:
        """Do all but the newest groups of every lane."""
        for lane in self.batch.index(m):
            group = self.groups.get(int(lane))
            while group and len(group.closed) > newest:
                for store in group.closed.pop(0):
                    self.write(store)

    def write(self, store: Store) -> None:
        """Read shared memory and write global memory."""
        batch, lanes = self.batch, np.full(len(store.offsets), store.lane)
        values = batch.shared.view(store.size)[store.flat // store.size]
        addresses = store.offsets.astype(np.uint64) + np.uint64(GLOBAL_BASE)
        batch.global_memory.write(lanes, addresses, values[:, None])
        cta, warp = int(batch.cta[store.lane]), int(batch.warp[store.lane])
        batch.clocks.completed(cta, warp, batch.clocks.store, store.epoch)

    def check_exit(self, m: np.ndarray) -> None:
        """Refuse to leave with copies that may still read shared memory."""
        for lane, group in self.groups.items():
            left = [*itertools.chain.from_iterable(group.closed), *group.open]
            if m[lane] and left and self.batch.checks.pending:
                self.batch.inst = left[0].inst
                shared = self.batch.shared
                offset = int(left[0].flat.min()) % shared.stride - shared.base
                text = f"left the kernel with a bulk copy from offset {offset} on its way"
                self.batch.fault("pending", text, lane)


def bulk_binder(inst: Inst, batch: Batch) -> Run:
    """The closure of a cp.async.bulk instruction."""
    copies = batch.part(BulkCopies)
    if "commit_group" in inst.mods:
        return copies.commit
    if "wait_group" in inst.mods:
        assert isinstance(inst.operands[0], Imm)
        newest = inst.operands[0].bits
        return lambda m: copies.wait(m, newest)
    if "prefetch" in inst.mods:
        return lambda m: None
    if any(mod.startswith(("multicast", "im2col", "cta_group")) for mod in inst.mods):
        raise ValueError("multicast and im2col")
    spaces = [mod.split("::")[0] for mod in inst.mods if mod.startswith(("shared", "global"))]
    one = _tile if "tensor" in inst.mods else _block
    return one(inst, batch, copies, spaces[0] == "shared")


def _tile(inst: Inst, batch: Batch, copies: BulkCopies, loads: bool) -> Run:
    shared_operand, map_operand = inst.operands[:2] if loads else inst.operands[1::-1]
    place, map_address = address_of(batch, shared_operand), address_of(batch, map_operand)
    corner = [batch.source(c, "s32") for c in map_operand.coordinates]
    mbarrier = address_of(batch, inst.operands[2]) if loads else None

    def run(m: Mask) -> None:
        batch.inst = inst
        for lane in batch.index(m):
            lanes = np.array([lane])
            tensor = copies.map_at(int(map_address(lanes)[0]), int(lane))
            at = [int(np.broadcast_to(c, batch.num_lanes)[lane]) for c in reversed(corner)]
            offsets, inside = tensor.offsets(at)
            num_bytes = tensor.num_bytes
            flat = copies.shared_places(int(lane), int(place(lanes)[0]), num_bytes, 128)
            order = flat + np.arange(0, num_bytes, tensor.size)
            begin = flat - flat % batch.shared.stride
            order = begin + swizzled(order - begin, tensor.swizzle)
            if not loads:
                chosen = (order[inside], offsets[inside], tensor.size)
                copies.store(int(lane), flat, num_bytes, chosen)
                continue
            memory, addresses = batch.global_memory, offsets[inside].astype(np.uint64)
            values = np.zeros(len(offsets), f"u{tensor.size}")
            many = np.full(len(addresses), lane)
            addresses += np.uint64(GLOBAL_BASE)
            if len(many):
                values[inside] = memory.read(many, addresses, tensor.size, 1)[:, 0]
            barrier = int(copies.mbarriers.flat(lanes, mbarrier(lanes))[0])
            copies.load(int(lane), flat, order, values, barrier)

    return run


def _block(inst: Inst, batch: Batch, copies: BulkCopies, loads: bool) -> Run:
    to, source, size = inst.operands[:3]
    first, second = address_of(batch, to), address_of(batch, source)
    amount = batch.source(size, "u32")
    mbarrier = address_of(batch, inst.operands[3]) if loads else None

    def run(m: Mask) -> None:
        batch.inst = inst
        for lane in batch.index(m):
            lanes = np.array([lane])
            num_bytes = int(np.broadcast_to(amount, batch.num_lanes)[lane])
            if num_bytes % 16:
                batch.fault("misaligned", f"bulk copy of {num_bytes} bytes", int(lane))
            shared_at, global_at = (first, second) if loads else (second, first)
            flat = copies.shared_places(int(lane), int(shared_at(lanes)[0]), num_bytes, 16)
            steps = np.arange(0, num_bytes, 8)
            addresses = global_at(lanes) + steps.astype(np.uint64)
            if loads:
                many = np.full(len(steps), lane)
                values = batch.global_memory.read(many, addresses, 8, 1)[:, 0]
                barrier = int(copies.mbarriers.flat(lanes, mbarrier(lanes))[0])
                copies.load(int(lane), flat, flat + steps, values, barrier)
            else:
                offsets = batch.device.offsets_of(addresses)
                copies.store(int(lane), flat, num_bytes, (flat + steps, offsets, 8))

    return run
