"""Global memory: one arena of bytes with an owner for each byte, and gaps between allocations.

Constants, module variables and kernel parameters live in the arena too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from tools.simt.numbers import UINT

# Below every address of this process, and what a null pointer and a small offset do not reach.
GLOBAL_BASE = 1 << 36
SHARED_WINDOW = 1 << 48  # generic addresses of shared memory
LOCAL_WINDOW = 1 << 49  # generic addresses of a thread's own memory
GAP = 512  # bytes nobody owns on both sides of an allocation
MOST_COPIED = 1 << 30  # bytes of a storage that is copied whole


class Output:
    """An array whose content before the launch must not be read."""

    def __init__(self, array: Any) -> None:
        self.array = array


def as_bytes(array: Any) -> np.ndarray:
    """The bytes of a contiguous NumPy array or CPU tensor, shared with it."""
    if hasattr(array, "data_ptr"):  # torch, which NumPy cannot read in bfloat16
        array = array.detach()
        import torch

        array = array.view(torch.uint8) if array.dim() else array.reshape(1).view(torch.uint8)
        array = array.numpy()
    if not array.flags.c_contiguous:
        raise ValueError("simt: arrays must be contiguous")
    return array.reshape(-1).view(np.uint8)


def pieces_of(tensor: Any) -> Iterator[Any]:
    """What a kernel may touch through a CPU tensor, as contiguous tensors.

    That is its whole storage, and of one too large to copy the tensor's own rows.
    """
    import torch

    storage = tensor.untyped_storage()
    if storage.nbytes() <= MOST_COPIED:
        yield torch.empty(0, dtype=torch.uint8).set_(storage)
        return
    for row in itertools.product(*map(range, tensor.shape[:-1])):
        yield tensor[row]


class Device:
    """Global memory and the arrays that were put there."""

    def __init__(self) -> None:
        self.used = GAP
        self.names: list[tuple[str, int, int]] = [("nothing", 0, 0)]  # name, offset, bytes
        self.arrays: list[tuple[np.ndarray, int]] = []
        self.addresses: dict[tuple[int, int], int] = {}
        self.tensor_maps: list[Any] = []
        # Arrays that keep their addresses: begin, end and arena offset - begin, ascending.
        self.adopted = np.zeros((0, 3), np.int64)
        self.bytes = np.zeros(0, np.uint8)
        self.owner = np.zeros(0, np.int16)
        self.written = np.zeros(0, bool)
        self._grow(1 << 16)

    def _grow(self, capacity: int) -> None:
        for name in ("bytes", "owner", "written"):
            old = getattr(self, name)
            new = np.zeros(capacity, old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)
        self.rows: dict[tuple[int, int], np.ndarray] = {}

    def allocate(self, num_bytes: int, name: str, align: int = 256) -> int:
        """Address of new memory that holds 0xFF and counts as not written."""
        offset = -(-self.used // align) * align
        self.used = offset + num_bytes + GAP
        if self.used > len(self.bytes):
            self._grow(max(2 * len(self.bytes), -(-self.used // 4096) * 4096))
        self.owner[offset : offset + num_bytes] = len(self.names)
        self.bytes[offset : offset + num_bytes] = 0xFF
        self.written[offset : offset + num_bytes] = False
        self.names.append((name, offset, num_bytes))
        return GLOBAL_BASE + offset

    def store(self, data: bytes | np.ndarray, name: str, align: int = 256) -> int:
        """Address of a copy of bytes."""
        content = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        address = self.allocate(len(content), name, align)
        offset = address - GLOBAL_BASE
        self.bytes[offset : offset + len(content)] = content
        self.written[offset : offset + len(content)] = True
        return address

    def pointer(self, array: Any, name: str = "") -> int:
        """The address of an array's copy; the same array gets the same address.

        After every launch on this device the array holds what the kernel left in the copy.
        """
        fresh = isinstance(array, Output)
        content = as_bytes(array.array if fresh else array)
        key = (content.__array_interface__["data"][0], len(content))
        if key not in self.addresses or not len(content):
            label = name or f"array {len(self.arrays)}"
            address = self.store(content, label)
            if fresh:
                offset = address - GLOBAL_BASE
                self.bytes[offset : offset + len(content)] = 0xFF
                self.written[offset : offset + len(content)] = False
            self.addresses[key] = address
            self.arrays.append((content, address - GLOBAL_BASE))
        return self.addresses[key]

    def adopt(self, array: Any, name: str = "") -> None:
        """Let kernels use an array at the address that it has in this process.

        For parameters and tables of addresses that were made for memory of the process.
        """
        content = as_bytes(array)
        begin = content.__array_interface__["data"][0]
        if not len(content) or begin in self.adopted[:, 0]:
            return
        room = self.allocate(len(content) + 256, name or f"array {len(self.arrays)}")
        offset = room - GLOBAL_BASE + begin % 256
        label, size = self.names[-1][0], len(content)
        self.owner[offset - begin % 256 : offset + size + 256] = 0
        self.owner[offset : offset + size] = len(self.names) - 1
        self.names[-1] = (label, offset, size)
        self.bytes[offset : offset + size] = content
        self.written[offset : offset + size] = True
        self.arrays.append((content, offset))
        rows = [*self.adopted.tolist(), [begin, begin + size, offset - begin]]
        self.adopted = np.array(sorted(rows), np.int64)

    def adopt_tensor(self, tensor: Any, name: str) -> None:
        """Let kernels use a CPU tensor at the address that it has in this process."""
        for piece in pieces_of(tensor):
            self.adopt(piece, name)

    def offsets_of(self, addresses: np.ndarray) -> np.ndarray:
        """Places in the arena of addresses, in or out of an allocation."""
        addresses = addresses.astype(np.uint64).view(np.int64)
        offsets = addresses - GLOBAL_BASE
        if len(self.adopted):
            begins, ends, shifts = self.adopted.T
            at = np.searchsorted(begins, addresses, side="right") - 1
            near = (at >= 0) & (addresses < ends[at] + GAP // 2)  # the gap behind it included
            offsets = np.where(near, addresses + shifts[at], offsets)
        return offsets

    def refresh(self) -> None:
        """Copy every array to its place again."""
        for content, offset in self.arrays:
            if self.written[offset : offset + len(content)].all():
                self.bytes[offset : offset + len(content)] = content

    def write_back(self) -> None:
        """Copy every array's place back to the array."""
        for content, offset in self.arrays:
            if content.flags.writeable:
                content[:] = self.bytes[offset : offset + len(content)]

    def view(self, width: int, count: int = 1) -> np.ndarray:
        """The arena as rows of `count` unsigned integers of `width` bytes."""
        if (width, count) not in self.rows:
            whole = len(self.bytes) // (width * count) * width * count
            flat = self.bytes[:whole].view(UINT[width])
            self.rows[width, count] = flat if count == 1 else flat.reshape(-1, count)
        return self.rows[width, count]

    def bad(self, offsets: np.ndarray, num_bytes: int) -> np.ndarray:
        """Which accesses are not inside one allocation."""
        last = len(self.bytes) - num_bytes
        inside = (offsets >= 0) & (offsets <= last)
        at = np.where(inside, offsets, 0)
        owner = self.owner[at]
        return (owner == 0) | (owner != self.owner[at + (num_bytes - 1)])

    def describe(self, offset: int) -> str:
        """The allocation next to an offset, for a report."""
        if not 0 <= offset < self.used + GAP:
            return f"address {offset + GLOBAL_BASE:#x}, far from any allocation"
        nearest = min(self.names[1:], key=lambda a: max(a[1] - offset, offset - a[1] - a[2] + 1, 0))
        name, begin, size = nearest
        return f"{offset - begin} bytes into '{name}' of {size} bytes"
