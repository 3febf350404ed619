"""Tensors of a call of the extension, moved in memory on their way to the CUDA kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.ops import _native_cuda


@contextlib.contextmanager
def arguments_moved(move: Callable[[Tensor, bool], Tensor | None]) -> Iterator[None]:
    """Inside `native_on_ptx`: kernels work on copies, which are copied back.

    Args:
        move: a tensor, and whether it has a row stride -> its copy, or None to leave it alone.
    """
    execute = _native_cuda.call

    def call(name: str, plain: Any, tensors: Any, reached: Any) -> None:
        plain, copies = dict(plain), {}
        for key, tensor in tensors.items():
            stride = "row_stride" if key == "logits" else f"{key}_row_stride"
            copy = move(tensor.detach(), stride in plain)
            if copy is not None:
                copies[key], plain[key] = copy, copy.data_ptr()
                if stride in plain:
                    plain[stride] = copy.stride(0)
        execute(name, plain, {**tensors, **copies}, reached)
        for key, copy in copies.items():
            # What works in place has one tensor twice, and one of its copies is as it was.
            if not same_bits(copy, tensors[key].detach()):
                tensors[key].detach().copy_(copy)

    _native_cuda.call = call
    try:
        yield
    finally:
        _native_cuda.call = execute


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))
