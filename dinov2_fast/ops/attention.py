"""Attention inside each sequence of a pack: softmax(q k^T * scale) v, no sequence sees another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dinov2_fast.backends import choose_backend
from dinov2_fast.ops._checks import accumulation_dtype, check_device, check_pack, check_tensor
from dinov2_fast.packing import Pack, check_cu_seqlens, unpack_tokens


def attention_reference(q: Tensor, k: Tensor, v: Tensor, pack: Pack, *, scale: float) -> Tensor:
    """Plain attention, one batched product per run of equally long sequences.

    Args:
        q: [T, H, D] queries.
        k: [T, H, D] keys.
        v: [T, H, D] values.
        pack: layout of the T tokens.
        scale: factor on the scores.
    Returns:
        [T, H, D].
    """
    weights = [scores.softmax(dim=-1) for scores in _scores(q, k, pack, scale)]  # [S, H, N, N]
    values = _heads_first(v, pack)  # [S, H, N, D]
    outputs = [weight @ value for weight, value in zip(weights, values, strict=True)]
    return torch.cat([output.transpose(1, 2).flatten(0, 1) for output in outputs])  # [T, H, D]


def lse_reference(q: Tensor, k: Tensor, pack: Pack, *, scale: float) -> Tensor:
    """Logarithm of each query's softmax denominator: [H, T], at least in float32."""
    scores = [s.to(accumulation_dtype(s)) for s in _scores(q, k, pack, scale)]  # [S, H, N, N]
    return torch.cat([s.logsumexp(dim=-1).transpose(0, 1).flatten(1) for s in scores], dim=1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pack: Pack,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention inside each sequence of a pack.

    Args:
        q: [T, H, D] queries; any strides.
        k: [T, H, D] keys.
        v: [T, H, D] values.
        pack: layout of the T tokens; empty sequences and T = 0 are allowed.
        scale: factor on the scores; None is D^-0.5.
        backend: see `backends.choose_backend`.
    Returns:
        [T, H, D]; a sequence never sees another one, not even its NaN.
    Raises:
        TypeError: not floating-point tensors, or not a `Pack`.
        ValueError: shapes, dtypes or devices that do not fit each other.
        BackendUnavailable: the explicit backend cannot compute this call.
    Source: block-diagonal masks of xFormers' memory-efficient attention, as DINOv2 uses them.
    """
    scale = _check("attention", q, k, v, pack, scale)
    choose_backend("attention", q, backend)  # raises for what has no kernel
    return attention_reference(q, k, v, pack, scale=scale)


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pack: Pack,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and the logarithm of each query's softmax denominator (natural logarithm).

    Args:
        q: [T, H, D] queries; any strides.
        k: [T, H, D] keys.
        v: [T, H, D] values.
        pack: layout of the T tokens.
        scale: factor on the scores; None is D^-0.5.
        backend: see `backends.choose_backend`.
    Returns:
        The output [T, H, D] and lse [H, T] float32 (float64 for float64 inputs).
    Raises:
        TypeError: see `attention`.
        ValueError: see `attention`.
        BackendUnavailable: see `attention`.
    """
    scale = _check("attention_with_lse", q, k, v, pack, scale)
    choose_backend("attention", q, backend)
    lse = lse_reference(q, k, pack, scale=scale)
    return attention_reference(q, k, v, pack, scale=scale), lse


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention over sequences given by their cumulative lengths, as flash-attention takes them.

    Reads `cu_seqlens` on the host, so it waits for the device; `attention` with a `Pack` does not.

    Args:
        q: [T, H, D] queries; any strides.
        k: [T, H, D] keys.
        v: [T, H, D] values.
        cu_seqlens: [S + 1] int32 cumulative lengths from 0 to T; equal neighbours are an empty
            sequence.
        max_seqlen: upper bound on the length of a sequence, in tokens.
        scale: factor on the scores; None is D^-0.5.
        backend: see `backends.choose_backend`.
    Returns:
        [T, H, D].
    Raises:
        TypeError: see `attention`.
        ValueError: see `attention`, and cumulative lengths that do not describe T tokens.
        BackendUnavailable: see `attention`.
    """
    check_tensor("attention_varlen", "q", q, "T", "H", "D")
    check_device("attention_varlen", q.device, cu_seqlens=cu_seqlens)
    check_cu_seqlens(cu_seqlens, max_seqlen, total=q.shape[0])
    pack = Pack.from_cu_seqlens(cu_seqlens, max_seqlen)
    return attention(q, k, v, pack, scale=scale, backend=backend)


def attention_weights(
    q: Tensor, k: Tensor, pack: Pack, *, scale: float | None = None
) -> list[Tensor]:
    """The softmax weights themselves, for looking at them; always computed by the reference.

    Args:
        q: [T, H, D] queries; any strides.
        k: [T, H, D] keys.
        pack: layout of the T tokens.
        scale: factor on the scores; None is D^-0.5.
    Returns:
        One [S_i, H, N_i, N_i] per group of the pack; the last dimension sums to 1.
    Raises:
        TypeError: see `attention`.
        ValueError: see `attention`.
    """
    scale = _check("attention_weights", q, k, k, pack, scale)
    if not pack.groups:
        return []
    return [scores.softmax(dim=-1) for scores in _scores(q, k, pack, scale)]


def _scores(q: Tensor, k: Tensor, pack: Pack, scale: float) -> list[Tensor]:
    """Scaled scores [S_i, H, N_i, N_i] of each group."""
    queries, keys = _heads_first(q * scale, pack), _heads_first(k, pack)
    return [q_i @ k_i.transpose(-2, -1) for q_i, k_i in zip(queries, keys, strict=True)]


def _heads_first(x: Tensor, pack: Pack) -> list[Tensor]:
    """[T, H, D] as one [S_i, H, N_i, D] per group; no group counts as one empty sequence."""
    groups = unpack_tokens(x, pack) or [x.unsqueeze(0)]
    return [group.transpose(1, 2) for group in groups]


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, pack: Pack, scale: float | None) -> float:
    """Refuse wrong arguments; the scale to use."""
    check_tensor(op, "q", q, "T", "H", "D")
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(op, name, tensor, *q.shape)
        if tensor.dtype != q.dtype:
            raise ValueError(f"{op}: {name} must have the dtype of q {q.dtype}, got {tensor.dtype}")
    check_device(op, q.device, k=k, v=v)
    check_pack(op, pack, q)
    if q.shape[2] == 0:
        raise ValueError(f"{op}: head dimension must be at least 1, got q {tuple(q.shape)}")
    if scale is None:
        return float(q.shape[2]) ** -0.5
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    return scale
