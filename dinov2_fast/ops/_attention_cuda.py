"""Calls of the extension's attention kernels on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.ops._attention_layout import in_vectors, launches_of, strides, why_not_vectors
from dinov2_fast.ops._native_cpu import dtype_name
from dinov2_fast.ops._native_cuda import run_cuda

HEAD_DIM = 64
_ONE_KERNEL = 264  # queries and keys whose gradients one block makes alone


def refusals(**tensors: Tensor) -> dict[str, str]:
    """Why the type, head dimension or layout of a [T, H, D] tensor rules out the kernels."""
    dtype = next(iter(tensors.values())).dtype
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            return {"native": f"{name} must be {dtype} as the others, got {tensor.dtype}"}
        if tensor.shape[2] != HEAD_DIM:
            return {"native": f"head dimension must be {HEAD_DIM}, got {tensor.shape[2]}"}
        if why := why_not_vectors(name, tensor):
            return {"native": why}
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
    q, k, v = (in_vectors(x) for x in (q, k, v))
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
    d_out, q, k, v = (in_vectors(x) for x in (d_out, q, k, v))
    tensors = {"q": q, "k": k, "v": v, "out": out}
    gradients = {"d_out": d_out, "d_q": d_q, "d_k": d_k, "d_v": d_v}
    common = _arguments(q_offsets, k_offsets, launches, scale, **tensors, **gradients)
    orders = {
        run.in_any_order
        for run in launches_of(launches)
        if max(run.max_queries, run.max_keys) > _ONE_KERNEL
    }
    delta = torch.empty_like(lse) if 0 in orders else None
    sums = q.new_zeros(q.shape, dtype=torch.float32) if 1 in orders else None
    run_cuda("attention_backward_cuda", **common, lse=lse, delta=delta, d_q_sums=sums)


def _arguments(
    q_offsets: Tensor, k_offsets: Tensor, launches: Sequence[int], scale: float, **tensors: Tensor
) -> dict[str, Any]:
    """What both directions take; tensors are [T, H, D]."""
    numbers: dict[str, int] = {}
    for name, tensor in tensors.items():
        numbers[f"{name}_row_stride"], numbers[f"{name}_head_stride"] = strides(tensor)
    return {
        **tensors,
        **numbers,
        "query_offsets": q_offsets,
        "key_offsets": k_offsets,
        "launches": tuple(launches),
        "num_queries": tensors["q"].shape[0],
        "num_heads": tensors["q"].shape[1],
        "scale": scale,
        "dtype": dtype_name(tensors["q"]),
    }
