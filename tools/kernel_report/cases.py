"""What a case of the report is: one run of an op's calls, on any backend and in any types.

Native calls launch the kernels of the report; the reference on the same inputs in float64 is the
truth about their errors, and in the case's types it says which errors those types make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Types = tuple[torch.dtype, ...]
Place = Callable[[Tensor], Tensor]
# What a call is, and what it returned; in place, what it changed.
Calls = Iterator[tuple[str, dict[str, Tensor]]]
Run = Callable[[Any, Types, Place, str], Calls]


@dataclass(frozen=True)
class Case:
    """One run of the report."""

    run: Run
    sizes: Any
    types: Types

    @property
    def shape(self) -> str:
        """Sizes and types for people."""
        types = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in self.types)
        return f"{self.sizes} {', '.join(types)}"


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers on torch's default device that depend on seed and shape alone."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, device="cpu") * scale
    return numbers.to(torch.get_default_device())


def as_it_is(tensor: Tensor) -> Tensor:
    """A matrix whose rows follow each other."""
    return tensor.clone()


def exactly(tensor: Tensor) -> Tensor:
    """The values that a matrix has in the types of a case, for a truth to be computed from."""
    return tensor.double()
