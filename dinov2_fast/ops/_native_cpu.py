"""What ops hand to the extension's CPU kernels, and what they keep from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dinov2_fast import environment, native

# Rows whose sum is one partial sum. It never depends on the number of threads, so that neither
# does the order of any sum.
BLOCK_ROWS = 64

FLOATS = (torch.float32, torch.bfloat16)
_CUDA_FLOATS = (*FLOATS, torch.float16)
# What `declare` wants for a function that serves both devices.
NATIVE_DEVICES = (("native", "cpu"), ("native", "cuda"))
# Most arguments; asking each whether it is a tensor takes longer than calling a small kernel.
_AS_THEY_ARE = frozenset((bool, int, float, str, tuple))
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in _CUDA_FLOATS}

Argument: TypeAlias = Tensor | float | str | tuple[int, ...] | None


def run_cpu(name: str, **arguments: Argument) -> None:
    """Call the extension's function: tensors as pointers, None as a null pointer.

    Args:
        name: of the function.
        arguments: all but the instruction set and the number of threads; the latter may be given
            where memory was allocated for that many.
    """
    # A copy: `arguments` alone may keep a tensor alive that was made for this call.
    plain: dict[str, Any] = dict(arguments)
    for key, value in arguments.items():
        if type(value) in _AS_THEY_ARE:
            continue
        if value is None:
            plain[key] = 0
        elif isinstance(value, Tensor):
            plain[key] = value.data_ptr()
    if "threads" not in plain:
        plain["threads"] = torch.get_num_threads()
    getattr(native.module(), name)(**plain, level=environment.cpu_level())


def dtype_name(tensor: Tensor) -> str:
    """The dtype as the extension spells it."""
    return _NAMES.get(tensor.dtype) or str(tensor.dtype).removeprefix("torch.")


def refusals(
    matrices: Mapping[str, Tensor | None],
    vectors: Mapping[str, Tensor | None],
    *,
    floats: tuple[torch.dtype, ...] | None = None,
) -> dict[str, str]:
    """Why kernels cannot take these tensors, as `choose_backend` wants it; empty if they can.

    Args:
        matrices: name -> float tensor whose rows may be strided, its columns not.
        vectors: name -> tensor that must be contiguous.
        floats: types that the matrices may have; None is those of most kernels on their device.
    """
    for name, tensor in matrices.items():
        if tensor is None:
            continue
        if floats is None:
            floats = native_floats(tensor)
        if tensor.dtype not in floats:
            known = " or ".join(str(dtype).removeprefix("torch.") for dtype in floats)
            return {"native": f"{name} must be {known}, got {dtype_name(tensor)}"}
        if tensor.stride(-1) != 1 and tensor.numel() > 1:
            why = f"{name} must have adjacent columns (stride 1), got stride {tensor.stride(-1)}"
            return {"native": why}
    for name, tensor in vectors.items():
        if tensor is not None and not tensor.is_contiguous():
            return {"native": f"{name} must be contiguous, got stride {tensor.stride(0)}"}
    return {}


def on_cuda(tensor: Tensor) -> bool:
    """Whether native kernels compute on a tensor as on a GPU."""
    return tensor.is_cuda or (native.cuda_on_cpu and tensor.is_cpu)


def native_floats(tensor: Tensor) -> tuple[torch.dtype, ...]:
    """Float types that most native kernels take on a tensor's device."""
    return _CUDA_FLOATS if on_cuda(tensor) else FLOATS


def why_not_pair(stream: Tensor, branch: torch.dtype) -> str:
    """Why CUDA kernels take no such types of a residual stream and its branch, or ""."""
    if on_cuda(stream) and torch.float32 not in (stream.dtype, branch) and stream.dtype != branch:
        return f"a stream of {stream.dtype} takes a branch of that type or float32, got {branch}"
    return ""


def why_not_overlap(name: str, written: Tensor) -> str:
    """Why kernels cannot write to a matrix in place, or ""."""
    if written.stride(0) < written.shape[1] and written.shape[0] > 1:
        return f"{name} must have rows that do not overlap, got {written.stride()}"
    return ""


def in_float32(vector: Tensor) -> Tensor:
    """The vector itself where it is float32 already: asking costs a tenth of a conversion."""
    return vector if vector.dtype == torch.float32 else vector.float()


def adjacent_columns(gradient: Tensor) -> Tensor:
    """An incoming gradient, copied when autograd expanded it; no caller chose that layout."""
    return gradient if gradient.stride(-1) == 1 else gradient.contiguous()


def new_partials(like: Tensor, num_rows: int, *width: int) -> Tensor:
    """Scratch for the sums over blocks of rows: [blocks, *width] float32.

    Without rows one block of zeros, since a null pointer says that no sums are wanted.
    """
    if num_rows == 0:
        return like.new_zeros((1, *width), dtype=torch.float32)
    return like.new_empty((-(-num_rows // BLOCK_ROWS), *width), dtype=torch.float32)
