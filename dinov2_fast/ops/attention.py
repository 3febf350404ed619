"""Attention inside each sequence of a pack: softmax(q k^T * scale) v, no sequence sees another."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.backends import choose_backend
from dinov2_fast.ops import _attention_native as native_kernels
from dinov2_fast.ops._checks import accumulation_dtype, check_device, check_pack, check_tensor
from dinov2_fast.ops._declare import declare
from dinov2_fast.ops._native_cpu import adjacent_columns, refusals
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
    refused = refusals({"q": q, "k": k, "v": v}, {})
    chosen = choose_backend("attention", q, backend, refusals=refused)
    if chosen == "reference":
        return attention_reference(q, k, v, pack, scale=scale)
    return _forward(q, k, v, pack.offsets, scale, chosen)[0]


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
    refused = refusals({"q": q, "k": k, "v": v}, {})
    chosen = choose_backend("attention", q, backend, refusals=refused)
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if chosen == "reference" or differentiated:  # there lse has a gradient too
        lse = lse_reference(q, k, pack, scale=scale)
        return attention_reference(q, k, v, pack, scale=scale), lse
    return _forward(q, k, v, pack.offsets, scale, chosen)


@torch.no_grad()
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pack: Pack,
    *,
    scale: float,
    q_pack: Pack | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention outside autograd, where each sequence may have fewer queries than keys.

    Args:
        q: [Tq, H, D] queries; any strides.
        k: [T, H, D] keys.
        v: [T, H, D] values.
        pack: layout of the T keys.
        scale: factor on the scores.
        q_pack: layout of the Tq queries, with the same number of sequences: those of sequence i see
            its keys. None is `pack`.
        backend: see `backends.choose_backend`.
    Returns:
        The output [Tq, H, D] in the dtype of q, and lse [H, Tq] float32 (float64 for float64).
    Raises:
        ValueError: the packs differ in their number of sequences, or do not fit the tensors.
        BackendUnavailable: the explicit backend cannot compute this call.
    """
    queries = _query_pack("attention_forward", q, k, pack, q_pack)
    refused = refusals({"q": q, "k": k, "v": v}, {})
    if choose_backend("attention", q, backend, refusals=refused) == "native":
        return native_kernels.forward(q, k, v, queries.offsets, pack.offsets, scale)
    dtype = accumulation_dtype(q)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=dtype, device=q.device)
    for count, rows, keys in _runs(queries, pack):
        scores = _run_scores(q[rows], k[keys], count, scale)  # [S_i, H, n, m]
        lse[:, rows] = scores.to(dtype).logsumexp(dim=-1).transpose(0, 1).flatten(1)
        values = _each(v[keys], count)
        weights = scores.softmax(dim=-1)
        out[rows] = torch.einsum("shnm,smhd->snhd", weights, values).flatten(0, 1)
    return out, lse


@torch.no_grad()
def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    pack: Pack,
    *,
    scale: float,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    q_pack: Pack | None = None,
    backend: str | None = None,
) -> None:
    """Write the gradients of `attention_forward`.

    Args:
        d_out: [Tq, H, D] gradient of the output.
        q: [Tq, H, D] queries.
        k: [T, H, D] keys.
        v: [T, H, D] values.
        lse: [H, Tq] of the forward pass.
        pack: layout of the keys.
        scale: factor on the scores.
        d_q: [Tq, H, D], written; may be a strided view.
        d_k: [T, H, D], written.
        d_v: [T, H, D], written.
        q_pack: layout of the queries; None is `pack`.
        backend: see `backends.choose_backend`.
    Raises:
        ValueError: see `attention_forward`.
        BackendUnavailable: the explicit backend cannot compute this call.
    """
    queries = _query_pack("attention_backward", q, k, pack, q_pack)
    gradients = {"d_q": d_q, "d_k": d_k, "d_v": d_v}
    refused = refusals({"d_out": d_out, "q": q, "k": k, "v": v, **gradients}, {})
    if choose_backend("attention", q, backend, refusals=refused) == "native":
        offsets = (queries.offsets, pack.offsets)
        return native_kernels.backward(d_out, q, k, v, lse, *offsets, scale, **gradients)
    for count, rows, keys in _runs(queries, pack):
        q_i, d_out_i = _each(q[rows], count), _each(d_out[rows], count)
        k_i, v_i = _each(k[keys], count), _each(v[keys], count)
        scores = _run_scores(q[rows], k[keys], count, scale)  # [S_i, H, n, m]
        lse_i = _each(lse[:, rows].t(), count).transpose(1, 2)  # [S_i, H, n]
        weights = (scores - lse_i.unsqueeze(-1)).exp().to(q.dtype)
        d_weights = torch.einsum("snhd,smhd->shnm", d_out_i, v_i)
        mean = (weights * d_weights).sum(dim=-1, keepdim=True)
        d_scores = weights * (d_weights - mean) * scale
        d_v[keys] = torch.einsum("shnm,snhd->smhd", weights, d_out_i).flatten(0, 1)
        d_q[rows] = torch.einsum("shnm,smhd->snhd", d_scores, k_i).flatten(0, 1)
        d_k[keys] = torch.einsum("shnm,snhd->smhd", d_scores, q_i).flatten(0, 1)


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


def _query_pack(op: str, q: Tensor, k: Tensor, pack: Pack, q_pack: Pack | None) -> Pack:
    """The layout of the queries, checked against that of the keys."""
    queries = pack if q_pack is None else q_pack
    check_pack(op, pack, k)
    check_pack(op, queries, q)
    if queries.num_sequences != pack.num_sequences:
        raise ValueError(
            f"{op}: q_pack must have the {pack.num_sequences} sequences of pack, "
            f"got {queries.num_sequences}"
        )
    return queries


def _runs(queries: Pack, pack: Pack) -> list[tuple[int, slice, slice]]:
    """Sequences that are computed at once: how many, the rows of their queries and of their keys.

    Equal neighbours go together where queries and keys have one layout.
    """
    if queries is pack:
        offsets = itertools.accumulate(pack.group_tokens, initial=0)
        rows = [slice(*pair) for pair in itertools.pairwise(offsets)]
        runs = [(count, each, each) for (count, _), each in zip(pack.groups, rows, strict=True)]
    else:
        pairs = (itertools.pairwise(each.offsets_host) for each in (queries, pack))
        runs = [(1, slice(*rows), slice(*keys)) for rows, keys in zip(*pairs, strict=True)]
    return [run for run in runs if run[1].stop > run[1].start or run[2].stop > run[2].start]


def _run_scores(q: Tensor, k: Tensor, count: int, scale: float) -> Tensor:
    """Scaled scores [S_i, H, n, m] of equally long sequences."""
    return torch.einsum("snhd,smhd->shnm", _each(q * scale, count), _each(k, count))


def _each(x: Tensor, count: int) -> Tensor:
    """Rows [count * n, ...] of equally long sequences as [count, n, ...]."""
    return x.reshape(count, x.shape[0] // count, *x.shape[1:])


def _forward_native_cpu(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Native forward on the CPU."""
    return native_kernels.forward(q, k, v, offsets, offsets, scale)


def _backward_native_cpu(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Native backward on the CPU into new tensors."""
    d_out = adjacent_columns(d_out)
    d_q, d_k, d_v = _empty_gradients(q, k, v)
    gradients = {"d_q": d_q, "d_k": d_k, "d_v": d_v}
    native_kernels.backward(d_out, q, k, v, lse, offsets, offsets, scale, **gradients)
    return d_q, d_k, d_v


def _empty_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous storage for gradients, whatever the strides of the tensors."""
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _backward_fake(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, ...]:
    return _empty_gradients(q, k, v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the inputs and lse; the output is not needed."""
    q, k, v, offsets, ctx.scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, output[1], offsets)


def _gradient(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of (q, k, v, offsets, scale, backend)."""
    q, k, v, lse, offsets = ctx.saved_tensors
    return *_backward(d_out, q, k, v, lse, offsets, ctx.scale, ctx.backend), None, None, None


_backward = declare(
    "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor offsets, "
    "float scale, str backend) -> (Tensor, Tensor, Tensor)",
    kernels={("native", "cpu"): _backward_native_cpu},
    fake=_backward_fake,
)
_forward = declare(
    "attention(Tensor q, Tensor k, Tensor v, Tensor offsets, float scale, str backend) "
    "-> (Tensor, Tensor)",
    kernels={("native", "cpu"): _forward_native_cpu},
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)
