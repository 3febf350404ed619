"""Launches of the Triton attention kernels: one per run of equally long sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from dinov2_fast.ops._attention_layout import Launch, launches_of
from dinov2_fast.ops._attention_layout import strides as strides_of
from dinov2_fast.ops._triton import device_of

MAX_HEAD_DIM = 128
_LOG2_E = 1.4426950408889634


def refusals(**tensors: Tensor) -> dict[str, str]:
    """Why the head dimension or the layout of a [T, H, D] tensor rules out the Triton backend."""
    for name, tensor in tensors.items():
        if tensor.shape[2] > MAX_HEAD_DIM:
            why = f"head dimension must be at most {MAX_HEAD_DIM}, got {tensor.shape[2]}"
            return {"triton": why}
        if tensor.stride(2) != 1 and tensor.numel() > 1:
            why = f"{name} must have adjacent columns (stride 1), got stride {tensor.stride(2)}"
            return {"triton": why}
    return {}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    launches: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [Tq, H, D] and lse [H, Tq] float32; offsets are [S + 1] int32."""
    kernels = _kernels()
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    with device_of(q):
        for run in launches_of(launches):
            tile = _tile(q, run.max_queries)
            num_blocks = -(-run.max_queries // tile["BLOCK_Q"])
            _launch(
                kernels.forward_kernel,
                run,
                num_blocks,
                (q, k, v, out, lse, q_offsets, k_offsets),
                (q, k, v, out),
                (lse.stride(0), scale * _LOG2_E),
                tile,
            )
    return out, lse


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    launches: Sequence[int],
    scale: float,
    *,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
) -> None:
    """Write the gradients of queries, keys and values; without out, it is computed once more."""
    kernels = _kernels()
    if out is None:
        out, _ = forward(q, k, v, q_offsets, k_offsets, launches, scale)
    delta = torch.empty_like(lse)
    sums = (lse.stride(0), delta.stride(0))
    with device_of(q):
        for run in launches_of(launches):
            tile = _tile(q, run.max_queries, backward=True)
            if run.max_queries <= tile["BLOCK_Q"] and run.max_keys <= tile["BLOCK_K"]:
                _launch(
                    kernels.backward_short_kernel,
                    run,
                    1,
                    (d_out, q, k, v, d_q, d_k, d_v, q_offsets, k_offsets),
                    (d_out, q, k, v, d_q, d_k, d_v),
                    (scale, scale * _LOG2_E),
                    tile,
                )
                continue
            _launch(
                kernels.backward_queries_kernel,
                run,
                -(-run.max_queries // tile["BLOCK_Q"]),
                (d_out, out, q, k, v, lse, delta, d_q, q_offsets, k_offsets),
                (d_out, out, q, k, v, d_q),
                (*sums, scale, scale * _LOG2_E),
                tile,
            )
            _launch(
                kernels.backward_keys_kernel,
                run,
                -(-run.max_keys // tile["BLOCK_K"]),
                (d_out, q, k, v, lse, delta, d_k, d_v, q_offsets, k_offsets),
                (d_out, q, k, v, d_k, d_v),
                (*sums, scale, scale * _LOG2_E),
                tile,
            )


def _kernels() -> Any:
    """The file of the kernels, whose types pyright cannot know."""
    from dinov2_fast.kernels import attention

    return attention


def _launch(
    kernel: Any,
    run: Launch,
    num_blocks: int,
    pointers: tuple[Tensor, ...],
    strided: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    tile: dict[str, Any],
) -> None:
    """One program per (sequence, block, head); arguments in the order of every attention kernel."""
    from dinov2_fast.kernels.launches import launchable

    heads = int(strided[0].shape[1])
    num_programs = run.num_sequences * num_blocks * heads
    if num_programs == 0:
        return
    strides = [stride for tensor in strided for stride in (tensor.stride(0), tensor.stride(1))]
    launchable(kernel, strided[0])[(num_programs,)](
        *pointers,
        *strides,
        *numbers,
        run.first,
        num_blocks,
        heads,
        VECTORS=all(map(_in_vectors, strided)),
        **tile,
    )


def _in_vectors(tensor: Tensor) -> bool:
    """Whether every row of every head begins at a multiple of 16 bytes."""
    size = tensor.element_size()
    # What is traced has no address yet: inductor aligns the memory that it starts in.
    traced = isinstance(tensor, FunctionalTensor)
    first = tensor.storage_offset() * size if traced else tensor.data_ptr()
    return not any(place % 16 for place in (first, *(s * size for s in strides_of(tensor))))


def _tile(q: Tensor, max_queries: int, *, backward: bool = False) -> dict[str, Any]:
    """Sizes of a program; none of them was tuned on a GPU yet."""
    from dinov2_fast.kernels.launches import INTERPRETED

    head_dim = int(q.shape[2])
    wide = max(16, 1 << (head_dim - 1).bit_length())
    blocks, num_warps = (64, 64), 8 if wide > 64 else 4
    if INTERPRETED:
        pass  # few large products are the fastest there
    elif q.dtype == torch.float32:  # no tensor cores: products keep float32's precision
        blocks, num_warps = ((16, 16) if wide > 64 else (32, 32)), 8  # fewer warps spill
    elif max_queries > 512 and not backward:
        blocks, num_warps = (128, 64), 8
    return {
        "D": head_dim,
        "WIDE": wide,
        "BLOCK_Q": blocks[0],
        "BLOCK_K": blocks[1],
        "PRECISION": "interpreted" if INTERPRETED else "ieee",
        "num_warps": num_warps,
        "num_stages": 1 if q.dtype == torch.float32 else 2,
    }
