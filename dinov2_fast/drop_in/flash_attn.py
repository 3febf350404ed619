"""Attention under the names and signatures of flash-attn, for an exchange of imports.

Only what a ViT asks for: every token sees every token of its own sequence. Arguments that ask for
more are refused by name. Results and gradients are those of `dinov2_fast.ops.attention`, on every
backend, the CPU included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinov2_fast.ops.attention import attention, attention_varlen
from dinov2_fast.packing import Pack

# Argument -> the values that ask for nothing, and what to do instead.
_NOTHING: dict[str, tuple[tuple[Any, ...], str]] = {
    "dropout_p": ((0, 0.0), "DINOv2 trains without attention dropout; pass 0"),
    "causal": ((False,), "use torch.nn.functional.scaled_dot_product_attention(is_causal=True)"),
    "window_size": (((-1, -1), (None, None)), "use flash-attn or flex_attention for windows"),
    "softcap": ((0, 0.0), "use flex_attention for capped scores"),
    "alibi_slopes": ((None,), "use flex_attention for biases that depend on positions"),
    "return_attn_probs": ((False,), "use dinov2_fast.ops.attention.attention_weights"),
    "block_table": ((None,), "use flash-attn for paged keys and values"),
}


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    **options: Any,
) -> Tensor:
    """Attention of sequences of one length.

    Args:
        q: [B, N, H, D] queries.
        k: [B, N, H, D] keys.
        v: [B, N, H, D] values.
        dropout_p: 0.
        softmax_scale: factor on the scores; None is D^-0.5.
        causal: False.
        **options: flash-attn's others, at the values that ask for nothing; `deterministic=True`
            asks for gradients with the same bits in every run.
    Returns:
        [B, N, H, D].
    Raises:
        TypeError: an argument that flash-attn does not have, or see `ops.attention`.
        ValueError: shapes that do not fit, or an argument that asks for more than a ViT needs.
    """
    op = "flash_attn_func"
    _check_options(op, dropout_p=dropout_p, causal=causal, **options)
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"{op}: expected q, k and v of one shape [B, N, H, D], got {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}; repeat shared heads, pad or pack sequences"
        )
    pack = Pack.from_groups([(q.shape[0], q.shape[1])], q.device)
    tokens_q, tokens_k, tokens_v = (x.flatten(0, 1) for x in (q, k, v))  # [T, H, D]
    chosen = {"scale": softmax_scale, "deterministic": options.get("deterministic") or None}
    return attention(tokens_q, tokens_k, tokens_v, pack, **chosen).view(q.shape)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    **options: Any,
) -> Tensor:
    """Attention of sequences of one length, from one packed tensor.

    Args:
        qkv: [B, N, 3, H, D].
        dropout_p: 0.
        softmax_scale: factor on the scores; None is D^-0.5.
        causal: False.
        **options: see `flash_attn_func`.
    Returns:
        [B, N, H, D].
    Raises:
        TypeError: see `flash_attn_func`.
        ValueError: see `flash_attn_func`.
    """
    q, k, v = _unpacked("flash_attn_qkvpacked_func", qkv, ndim=5)
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, **options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    **options: Any,
) -> Tensor:
    """Attention within each of several sequences laid end to end; reads lengths on the host.

    Args:
        q: [T, H, D] queries.
        k: [T, H, D] keys.
        v: [T, H, D] values.
        cu_seqlens_q: [S + 1] int32 cumulative lengths from 0 to T.
        cu_seqlens_k: equal to them.
        max_seqlen_q: upper bound on the length of a sequence, in tokens.
        max_seqlen_k: the same of the keys.
        dropout_p: 0.
        softmax_scale: factor on the scores; None is D^-0.5.
        causal: False.
        **options: see `flash_attn_func`.
    Returns:
        [T, H, D].
    Raises:
        TypeError: see `flash_attn_func`.
        ValueError: see `flash_attn_func`; or queries and keys of different lengths.
    """
    op = "flash_attn_varlen_func"
    _check_options(op, dropout_p=dropout_p, causal=causal, **options)
    if cu_seqlens_k is not cu_seqlens_q and not torch.equal(cu_seqlens_q, cu_seqlens_k):
        raise ValueError(
            f"{op}: expected cu_seqlens_k equal to cu_seqlens_q (self-attention), got "
            f"{tuple(cu_seqlens_k.shape)} other lengths; "
            "use torch.nn.functional.scaled_dot_product_attention for cross-attention"
        )
    longest = max(max_seqlen_q, max_seqlen_k)
    chosen = {"scale": softmax_scale, "deterministic": options.get("deterministic") or None}
    return attention_varlen(q, k, v, cu_seqlens_q, longest, **chosen)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    **options: Any,
) -> Tensor:
    """Attention within each of several sequences laid end to end, from one packed tensor.

    Args:
        qkv: [T, 3, H, D].
        cu_seqlens: [S + 1] int32 cumulative lengths from 0 to T.
        max_seqlen: upper bound on the length of a sequence, in tokens.
        dropout_p: 0.
        softmax_scale: factor on the scores; None is D^-0.5.
        causal: False.
        **options: see `flash_attn_func`.
    Returns:
        [T, H, D].
    Raises:
        TypeError: see `flash_attn_func`.
        ValueError: see `flash_attn_func`.
    """
    q, k, v = _unpacked("flash_attn_varlen_qkvpacked_func", qkv, ndim=4)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(q, k, v, *lengths, dropout_p, softmax_scale, causal, **options)


def _unpacked(op: str, qkv: Tensor, *, ndim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as views of a packed tensor."""
    if qkv.ndim != ndim or qkv.shape[-3] != 3:
        shape = "[B, N, 3, H, D]" if ndim == 5 else "[T, 3, H, D]"
        raise ValueError(f"{op}: expected qkv {shape}, got {tuple(qkv.shape)}")
    q, k, v = qkv.unbind(-3)
    return q, k, v


def _check_options(op: str, **options: Any) -> None:
    """Refuse arguments that ask for more than attention inside each sequence."""
    for name, value in options.items():
        if name == "deterministic":
            continue
        if name not in _NOTHING:
            raise TypeError(f"{op}: expected an argument of flash-attn, got {name}")
        allowed, way_out = _NOTHING[name]
        value = tuple(value) if isinstance(value, list) else value
        if isinstance(value, Tensor) or value not in allowed:
            shown = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{op}: expected {name} {allowed[0]!r}, got {shown}; {way_out}")
