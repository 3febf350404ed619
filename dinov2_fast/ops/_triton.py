"""What the ops that have Triton kernels share: which tensors those take, and the current device."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from dinov2_fast.ops._native_cpu import FLOATS, refusals

TRITON_FLOATS = (*FLOATS, torch.float16)
# Keys for `declare`: Triton's interpreter runs the same kernels on the CPU.
TRITON_DEVICES = (("triton", "cuda"), ("triton", "cpu"))


def triton_refusals(
    matrices: Mapping[str, Tensor | None], vectors: Mapping[str, Tensor | None]
) -> dict[str, str]:
    """Why Triton kernels cannot take these tensors, as `choose_backend` wants it.

    Args:
        matrices: name -> float tensor whose rows may be strided, its columns not.
        vectors: name -> tensor that must be contiguous.
    """
    return for_triton(refusals(matrices, vectors, floats=TRITON_FLOATS))


def why_not_rows(
    backend: str,
    matrices: Mapping[str, Tensor | None],
    vectors: Mapping[str, Tensor | None] | None = None,
) -> str:
    """Why a backend's kernels cannot take these tensors, or "".

    Args:
        backend: of which `choose_backend` asks.
        matrices: name -> float tensor whose rows may be strided, its columns not.
        vectors: name -> tensor that must be contiguous.
    """
    refused = triton_refusals if backend == "triton" else refusals
    return refused(matrices, vectors or {}).get(backend, "")


def for_triton(refused: Mapping[str, str]) -> dict[str, str]:
    """The reasons that `refusals` gives for native kernels, said of Triton."""
    return {"triton": next(iter(refused.values()))} if refused else {}


def device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Make the tensor's GPU the current one: Triton launches there, but a traced graph later."""
    if isinstance(tensor, FunctionalTensor):
        return nullcontext()
    return torch.cuda.device_of(tensor)  # pyright: ignore[reportReturnType]
