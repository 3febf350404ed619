"""What ops hand to the extension's CUDA kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2_fast import native
from dinov2_fast.ops._native_cpu import Argument

# A CTA of the kernels that sum over rows, and how many CTAs fill the largest GPUs.
_TILE_ROWS, _TILE_COLUMNS, _TILE_CTAS = 8, 256, 2048
# The shortest part of a long row, and how many CTAs are worth cutting rows for.
_SPLIT_STEP, _SPLIT_CTAS = 2048, 1024


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


def row_blocks(num_rows: int, width: int, *, batch: int = 1) -> int:
    """Rows of partial sums of a matrix: CTAs along its rows.

    It depends on the matrix alone, so that the order of every sum is the same on every GPU.

    Args:
        num_rows: of the matrix.
        width: of the matrix, in elements.
        batch: rows that a thread takes at a time.
    """
    across = -(-width // _TILE_COLUMNS)
    return min(-(-num_rows // (_TILE_ROWS * batch)), -(-_TILE_CTAS // max(across, 1)))


def row_splits(num_ctas: int, width: int) -> int:
    """Parts of each row where so few CTAs with whole rows would leave a GPU idle.

    It depends on the matrix alone, so that the order of every sum is the same on every GPU.
    """
    steps = -(-width // _SPLIT_STEP)
    per_part = -(-steps // -(-_SPLIT_CTAS // max(num_ctas, 1)))
    return -(-steps // max(per_part, 1)) or 1


def new_cuda_partials(like: Tensor, num_rows: int, width: int) -> Tensor:
    """Scratch for sums over rows, [row_blocks, width] float32; zeros if there is nothing to sum."""
    if num_rows == 0 or width == 0:
        return like.new_zeros((1, width), dtype=torch.float32)
    return like.new_empty((row_blocks(num_rows, width), width), dtype=torch.float32)
