"""The table by which one launch of the optimizer's kernels reaches tensors of any number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

# Elements that a CTA computes. Sums of squares are of one chunk each, so their order is the same
# on every GPU.
CHUNK = 16384

# Puts numbers into a tensor of int64 of as many.
Write = Callable[[Tensor, tuple[int, ...]], None]


@dataclass(frozen=True)
class Table:
    """Where tensors lie, as the kernels read it."""

    numbers: Tensor
    """int64: addresses [lists, N], sizes [N], number of the first chunk [N]."""
    num_tensors: int
    num_chunks: int
    tensors: tuple[Tensor, ...]
    """Those that the addresses are of."""


def table_of(lists: Sequence[Sequence[Tensor | None]], *, chunk: int, write: Write) -> Table:
    """The table of lists of tensors of the same sizes, on their device.

    It is made anew for every launch, in memory of that launch's stream. None is kept: nobody knows
    for how long a captured graph would read it, or whether one that was captured is filled yet.

    Args:
        lists: each of N tensors, the first without gaps; the address of a gap is 0.
        chunk: elements of a chunk.
        write: brings the numbers to the device.
    """
    tensors = present([lists[0]])
    sizes = [tensor.numel() for tensor in tensors]
    addresses = [0 if x is None else x.data_ptr() for listed in lists for x in listed]
    *first_chunks, num_chunks = accumulate((-(-size // chunk) for size in sizes), initial=0)
    values = (*addresses, *sizes, *first_chunks)
    numbers = tensors[0].new_empty(len(values), dtype=torch.int64)
    write(numbers, values)
    return Table(numbers, len(sizes), num_chunks, tuple(present(lists)))


def present(lists: Iterable[Sequence[Tensor | None]]) -> list[Tensor]:
    """All tensors of some lists that may have gaps."""
    return [tensor for listed in lists for tensor in listed if tensor is not None]
