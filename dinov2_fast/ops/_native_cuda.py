"""What ops hand to the extension's CUDA kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2_fast import native
from dinov2_fast.ops._native_cpu import FLOATS, Argument, refusals

CUDA_FLOATS = (*FLOATS, torch.float16)


def run_cuda(name: str, *, reached: Iterable[Tensor] = (), **arguments: Argument) -> None:
    """Call the extension's function on the current stream of the tensors' GPU.

    Args:
        name: of the function.
        reached: tensors that the kernels find through a table of addresses.
        arguments: all but the device and the stream: tensors as pointers, None as a null pointer.
    """
    tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
    plain: dict[str, Any] = {key: 0 if value is None else value for key, value in arguments.items()}
    plain |= {key: tensor.data_ptr() for key, tensor in tensors.items()}
    call(name, plain, tensors, tuple(reached))


def call(
    name: str, plain: Mapping[str, Any], tensors: Mapping[str, Tensor], reached: tuple[Tensor, ...]
) -> None:
    """`run_cuda` once tensors are pointers; tests put an execution without a GPU in its place."""
    del reached  # the caller keeps them alive
    device = next(iter(tensors.values())).device
    stream = torch.cuda.current_stream(device).cuda_stream
    getattr(native.module(), name)(**plain, device=device.index, stream=stream)


def cuda_refusals(
    matrices: Mapping[str, Tensor | None], vectors: Mapping[str, Tensor | None]
) -> dict[str, str]:
    """Why the CUDA kernels cannot take these tensors, as `choose_backend` wants it.

    Args:
        matrices: name -> float tensor whose rows may be strided, its columns not.
        vectors: name -> tensor that must be contiguous.
    """
    return refusals(matrices, vectors, floats=CUDA_FLOATS)
