"""What kernels of a GPU are launched for, and the layouts that they move in whole vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

VECTOR = 8  # elements of 16 bytes, in which every row is moved


class Launch(NamedTuple):
    """Neighbouring sequences that one launch computes; blocks past a sequence's end do nothing.

    Args:
        first: number of the first sequence.
        num_sequences: how many there are.
        max_queries: tokens of the longest sequence of queries.
        max_keys: tokens of the longest sequence of keys.
        in_any_order: whether the backward may sum in any order.
    """

    first: int
    num_sequences: int
    max_queries: int
    max_keys: int
    in_any_order: int


def launches_of(numbers: Sequence[int]) -> Iterator[Launch]:
    """The launches that a schema holds as five numbers each."""
    yield from (Launch(*numbers[i : i + 5]) for i in range(0, len(numbers), 5))


def strides(tensor: Tensor) -> tuple[int, int]:
    """Row and head stride; 0 where there is one only, which may have any stride."""
    rows, heads = (tensor.stride(i) if tensor.shape[i] > 1 else 0 for i in (0, 1))
    return rows, heads


def why_not_vectors(name: str, tensor: Tensor) -> str:
    """Why the heads of a [T, H, D] tensor of 16-bit elements do not start at vectors, or ""."""
    # Tracing knows no offsets: `in_vectors` sees them once the op runs.
    offset = 0 if torch.compiler.is_compiling() else tensor.storage_offset()
    if any(place % VECTOR for place in (offset, *strides(tensor))):
        why = f"{name} must have its heads at multiples of 16 bytes, got strides"
        return f"{why} {tensor.stride()} from element {offset} on"
    return ""


def in_vectors(tensor: Tensor) -> Tensor:
    """A [T, H, D] tensor, or a copy where its heads do not start at vectors.

    Only for what no caller could be refused for: offsets under tracing, and autograd's gradients.
    """
    if tensor.stride(2) == 1 and not why_not_vectors("", tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
