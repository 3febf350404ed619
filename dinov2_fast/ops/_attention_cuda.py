"""Calls of the extension's attention kernels on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.ops._native_cpu import dtype_name
from dinov2_fast.ops._native_cuda import run_cuda

HEAD_DIM = 64
_VECTOR = 8  # elements of 16 bytes, in which every row is moved
_ONE_KERNEL = 264  # queries and keys whose gradients one block makes alone


def refusals(**tensors: Tensor) -> dict[str, str]:
    """Why the type, head dimension or layout of a [T, H, D] tensor rules out the kernels."""
    dtype = next(iter(tensors.values())).dtype
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            return {"native": f"{name} must be {dtype} as the others, got {tensor.dtype}"}
        if tensor.shape[2] != HEAD_DIM:
            return {"native": f"head dimension must be {HEAD_DIM}, got {tensor.shape[2]}"}
        # Tracing knows no offsets; the kernels' own check remains.
        offset = 0 if torch.compiler.is_compiling() else tensor.storage_offset()
        if any(place % _VECTOR for place in (offset, *_strides(tensor))):
            why = f"{name} must have its heads at multiples of 16 bytes, got strides"
            return {"native": f"{why} {tensor.stride()} from element {offset} on"}
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
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    common = _arguments(q_offsets, k_offsets, launches, scale, q=q, k=k, v=v, out=out)
    run_cuda("attention_forward_cuda", **common, lse=lse)
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
    if out is None:
        out, _ = forward(q, k, v, q_offsets, k_offsets, launches, scale)
    if refusals(d_out=d_out):
        d_out = d_out.contiguous()  # autograd's layout; that of callers was checked
    tensors = {"q": q, "k": k, "v": v, "out": out}
    gradients = {"d_out": d_out, "d_q": d_q, "d_k": d_k, "d_v": d_v}
    common = _arguments(q_offsets, k_offsets, launches, scale, **tensors, **gradients)
    delta, sums = torch.empty_like(lse), _sums(q, launches)
    run_cuda("attention_backward_cuda", **common, lse=lse, delta=delta, d_q_sums=sums)


def _sums(q: Tensor, launches: Sequence[int]) -> Tensor | None:
    """Zeros [Tq, H, D] for launches that add up the gradients of queries in any order."""
    runs = (launches[i : i + 5] for i in range(0, len(launches), 5))
    if any(in_any_order and max(q_k) > _ONE_KERNEL for _, _, *q_k, in_any_order in runs):
        return q.new_zeros(q.shape, dtype=torch.float32)
    return None


def _strides(tensor: Tensor) -> tuple[int, int]:
    """Row and head stride; 0 where there is one only, which may have any stride."""
    rows, heads = (tensor.stride(i) if tensor.shape[i] > 1 else 0 for i in (0, 1))
    return rows, heads


def _arguments(
    q_offsets: Tensor, k_offsets: Tensor, launches: Sequence[int], scale: float, **tensors: Tensor
) -> dict[str, Any]:
    """What both directions take; tensors are [T, H, D]."""
    strides: dict[str, int] = {}
    for name, tensor in tensors.items():
        strides[f"{name}_row_stride"], strides[f"{name}_head_stride"] = _strides(tensor)
    return {
        **tensors,
        **strides,
        "query_offsets": q_offsets,
        "key_offsets": k_offsets,
        "launches": tuple(launches),
        "num_queries": tensors["q"].shape[0],
        "num_heads": tensors["q"].shape[1],
        "scale": scale,
        "dtype": dtype_name(tensors["q"]),
    }
