"""What ops on rows of matrices hand to the extension, and what they keep from it."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast import environment, native

# Rows whose sum is one partial sum. It never depends on the number of threads, so that neither
# does the order of any sum.
BLOCK_ROWS = 64

_FLOATS = (torch.float32, torch.bfloat16)


def run_cpu(name: str, **arguments: Tensor | float | str | None) -> None:
    """Call the extension's function: tensors as pointers, None as a null pointer.

    Args:
        name: of the function.
        arguments: all but the number of threads and the instruction set.
    """
    plain = {
        key: value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value
        for key, value in arguments.items()
    }
    getattr(native.module(), name)(
        **plain, threads=torch.get_num_threads(), level=environment.cpu_level()
    )


def dtype_name(tensor: Tensor) -> str:
    """The dtype as the extension spells it."""
    return str(tensor.dtype).removeprefix("torch.")


def refusals(
    matrices: dict[str, Tensor | None], vectors: dict[str, Tensor | None]
) -> dict[str, str]:
    """Why kernels cannot take these tensors, as `choose_backend` wants it; empty if they can.

    Args:
        matrices: name -> float tensor whose rows may be strided, its columns not.
        vectors: name -> tensor that must be contiguous.
    """
    for name, tensor in matrices.items():
        if tensor is None:
            continue
        if tensor.dtype not in _FLOATS:
            return {"native": f"{name} must be float32 or bfloat16, got {dtype_name(tensor)}"}
        if tensor.numel() > 0 and tensor.stride(-1) != 1:
            why = f"{name} must have adjacent columns (stride 1), got stride {tensor.stride(-1)}"
            return {"native": why}
    for name, tensor in vectors.items():
        if tensor is not None and not tensor.is_contiguous():
            return {"native": f"{name} must be contiguous, got stride {tensor.stride(0)}"}
    return {}


def refuse_overlap(name: str, written: Tensor) -> dict[str, str]:
    """Why kernels cannot write to a matrix in place; empty if they can."""
    if written.shape[0] > 1 and written.stride(0) < written.shape[1]:
        return {"native": f"{name} must have rows that do not overlap, got {written.stride()}"}
    return {}


def adjacent_columns(gradient: Tensor) -> Tensor:
    """An incoming gradient, copied when autograd expanded it; no caller chose that layout."""
    return gradient if gradient.stride(1) == 1 else gradient.contiguous()


def new_partials(like: Tensor, num_rows: int, *width: int) -> Tensor:
    """Scratch for the sums over blocks of rows: [blocks, *width] float32."""
    blocks = -(-num_rows // BLOCK_ROWS)
    return like.new_empty((max(blocks, 1), *width), dtype=torch.float32)
