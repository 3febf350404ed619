"""Calls of an installed flash-attn, which computes attention of a whole pack at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinov2_fast import flash_attention
from dinov2_fast.errors import BackendUnavailable
from dinov2_fast.ops._attention_layout import VECTOR, Launch, in_vectors, why_not_vectors

MAX_HEAD_DIM = 256


def refusals(scale: float, **tensors: Tensor) -> dict[str, str]:
    """Why the scale, or the type, head dimension or layout of a [T, H, D] tensor rules it out."""
    if not scale > 0:  # a masked score is -inf times the scale
        return {"flash_attn": f"scale must be positive, got {scale}"}
    dtype = next(iter(tensors.values())).dtype
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            return {"flash_attn": f"{name} must be {dtype} as the others, got {tensor.dtype}"}
        if tensor.shape[2] > MAX_HEAD_DIM or tensor.shape[2] % VECTOR:
            why = f"head dimension must be a multiple of {VECTOR} up to {MAX_HEAD_DIM}"
            return {"flash_attn": f"{why}, got {tensor.shape[2]}"}
        if tensor.stride(2) != 1:
            why = f"{name} must have adjacent columns (stride 1), got stride {tensor.stride(2)}"
            return {"flash_attn": why}
        if why := why_not_vectors(name, tensor):
            return {"flash_attn": why}
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
    shape = q.shape[1], q.shape[0]
    if not q.numel() or not k.numel():  # it divides by the number of heads, and wants a sequence
        return q.new_zeros(q.shape), q.new_full(shape, -torch.inf, dtype=torch.float32)
    package = flash_attention.installed()
    layout = _layout(q_offsets, k_offsets, launches, scale)
    out, lse, *_ = package.forward(**_inputs(q=q, k=k, v=v), **layout)
    if lse.shape != shape or lse.dtype != torch.float32 or out.shape != q.shape:
        raise BackendUnavailable(
            f"attention: expected {package.name} to return out {tuple(q.shape)} and float32 lse "
            f"{shape}, got {tuple(out.shape)} and {lse.dtype} {tuple(lse.shape)}; "
            "use another backend or another version"
        )
    if q_offsets is not k_offsets:  # of queries without keys, which only two layouts can have
        lse.masked_fill_(lse == torch.inf, -torch.inf)
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
    if not q.numel() or not k.numel():
        for gradient in (d_q, d_k, d_v):
            gradient.zero_()
        return
    if out is None:
        out, _ = forward(q, k, v, q_offsets, k_offsets, launches, scale)
    flash_attention.installed().backward(
        **_inputs(dout=d_out, q=q, k=k, v=v),
        out=out,
        softmax_lse=lse,
        dq=d_q,
        dk=d_k,
        dv=d_v,
        deterministic=not Launch(*launches).in_any_order,
        **_layout(q_offsets, k_offsets, launches, scale),
    )


def _inputs(**tensors: Tensor) -> dict[str, Tensor]:
    """Tensors as the package wants them.

    Their version counters are their own, since some releases declare that they write to inputs;
    for autograd that would be a change of what other ops have saved.
    """
    return {name: in_vectors(tensor).data for name, tensor in tensors.items()}


def _layout(
    q_offsets: Tensor, k_offsets: Tensor, launches: Sequence[int], scale: float
) -> dict[str, Any]:
    """The pack and the scale under the package's names; the pack is one launch."""
    run = Launch(*launches)
    return {
        "cu_seqlens_q": q_offsets,
        "cu_seqlens_k": k_offsets,
        "max_seqlen_q": run.max_queries,
        "max_seqlen_k": run.max_keys,
        "softmax_scale": scale,
    }
