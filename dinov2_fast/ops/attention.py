"""Attention inside each sequence of a pack: softmax(q k^T * scale) v, no sequence sees another."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.ops import _attention_by_runs as by_runs
from dinov2_fast.ops._attention_kernels import (
    KERNELS,
    are_of_a_gpu,
    choose,
    is_usual,
    kernels_of,
    launches,
    query_pack,
)
from dinov2_fast.ops._checks import (
    accumulation_dtype,
    check_device,
    check_like,
    check_pack,
    check_tensor,
)
from dinov2_fast.ops._declare import declare
from dinov2_fast.ops._native_cpu import adjacent_columns
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
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention inside each sequence of a pack.

    Args:
        q: [T, H, D] queries; any strides.
        k: [T, H, D] keys.
        v: [T, H, D] values.
        pack: layout of the T tokens; empty sequences and T = 0 are allowed.
        scale: factor on the scores; None is D^-0.5.
        deterministic: whether the gradients have the same bits in every run. None asks
            `torch.use_deterministic_algorithms`; only native kernels on CUDA and flash-attn know
            another way.
        backend: see `backends.choose_backend`.
    Returns:
        [T, H, D]; a sequence never sees another one, not even its NaN (but for flash_attn).
    Raises:
        TypeError: not floating-point tensors, or not a `Pack`.
        ValueError: shapes, dtypes or devices that do not fit each other.
        BackendUnavailable: the explicit backend cannot compute this call.
    Source: block-diagonal masks of xFormers' memory-efficient attention, as DINOv2 uses them.
    """
    if is_usual(q, k, v, pack, scale, backend):
        scale = float(q.shape[2]) ** -0.5 if scale is None else scale
        return _forward(q, k, v, pack.offsets, [], scale, "native")[0]
    scale = _check("attention", q, k, v, pack, scale)
    chosen = choose(backend, pack, pack, scale=scale, q=q, k=k, v=v)
    if chosen == "reference":
        return attention_reference(q, k, v, pack, scale=scale)
    runs = launches(q, pack, pack, chosen, deterministic)
    return _forward(q, k, v, pack.offsets, runs, scale, chosen)[0]


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
    chosen = choose(backend, pack, pack, scale=scale, q=q, k=k, v=v)
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if chosen == "reference" or differentiated:  # there lse has a gradient too
        lse = lse_reference(q, k, pack, scale=scale)
        return attention_reference(q, k, v, pack, scale=scale), lse
    return _forward(q, k, v, pack.offsets, launches(q, pack, pack, chosen), scale, chosen)


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
    queries = query_pack("attention_forward", q, k, pack, q_pack)
    chosen = choose(backend, queries, pack, scale=scale, q=q, k=k, v=v)
    offsets = (queries.offsets, pack.offsets)
    if chosen != "reference":
        runs = launches(q, queries, pack, chosen)
        return kernels_of(q, chosen).forward(q, k, v, *offsets, runs, scale)
    return by_runs.forward(q, k, v, queries, pack, scale)


@torch.no_grad()
def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor | None,
    pack: Pack,
    *,
    scale: float,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    out: Tensor | None = None,
    q_pack: Pack | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> None:
    """Write the gradients of `attention_forward`.

    Args:
        d_out: [Tq, H, D] gradient of the output.
        q: [Tq, H, D] queries.
        k: [T, H, D] keys.
        v: [T, H, D] values.
        lse: [H, Tq] of the forward pass; may be None where `backward_reads_lse` says so.
        pack: layout of the keys.
        scale: factor on the scores.
        d_q: [Tq, H, D], written; may be a strided view.
        d_k: [T, H, D], written.
        d_v: [T, H, D], written.
        out: [Tq, H, D] output of the forward pass, contiguous; None is computed again where a
            backend needs it.
        q_pack: layout of the queries; None is `pack`.
        deterministic: see `attention`.
        backend: see `backends.choose_backend`.
    Raises:
        ValueError: see `attention_forward`; or the backend reads lse, which is None.
        BackendUnavailable: the explicit backend cannot compute this call.
    """
    queries = query_pack("attention_backward", q, k, pack, q_pack)
    gradients = {"d_q": d_q, "d_k": d_k, "d_v": d_v}
    tensors = {"d_out": d_out, "q": q, "k": k, "v": v, **gradients}
    chosen = choose(backend, queries, pack, scale=scale, **tensors)
    if chosen == "reference":
        return by_runs.backward(d_out, q, k, v, lse, queries, pack, scale, **gradients)
    if lse is None and are_of_a_gpu(q, chosen):
        raise ValueError(
            f"attention_backward: backend {chosen!r} reads lse, got None; "
            "choose one backend for both passes"
        )
    runs = launches(q, queries, pack, chosen, deterministic)
    arguments = (d_out, q, k, v, out, lse, queries.offsets, pack.offsets, runs, scale)
    kernels_of(q, chosen).backward(*arguments, **gradients)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    deterministic: bool | None = None,
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
        deterministic: see `attention`.
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
    return attention(q, k, v, pack, scale=scale, deterministic=deterministic, backend=backend)


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
    check_like(op, "q", q, k=k, v=v)
    check_pack(op, pack, q)
    head_dim = q.shape[2]
    if head_dim == 0:
        raise ValueError(f"{op}: head dimension must be at least 1, got q {tuple(q.shape)}")
    if scale is None:
        return float(head_dim) ** -0.5
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    return scale


def _forward_with(kernels: Any) -> Any:
    """The registered forward op by a backend's kernels."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, launches: list[int], scale: float
    ) -> tuple[Tensor, Tensor]:
        return kernels.forward(q, k, v, offsets, offsets, launches, scale)

    return run


def _backward_with(kernels: Any) -> Any:
    """The registered backward op by a backend's kernels, into new tensors."""

    def run(
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        lse: Tensor | None,
        offsets: Tensor,
        launches: list[int],
        scale: float,
    ) -> tuple[Tensor, ...]:
        arguments = (q, k, v, out, lse, offsets, offsets, launches, scale)
        d_q, d_k, d_v = _empty_gradients(q, k, v)
        kernels.backward(adjacent_columns(d_out), *arguments, d_q=d_q, d_k=d_k, d_v=d_v)
        return d_q, d_k, d_v

    return run


def _empty_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous storage for gradients, whatever the strides of the tensors."""
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


def _forward_fake(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _backward_fake(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return _empty_gradients(q, k, v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the inputs, and the output and lse for the kernels that read them."""
    q, k, v, offsets, ctx.launches, ctx.scale, ctx.backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # or lse gets a gradient of zeros in every backward pass
    kept = (out, lse) if are_of_a_gpu(q, ctx.backend) else (None, None)
    ctx.save_for_backward(q, k, v, *kept, offsets)


def _gradient(ctx: Any, d_out: Tensor | None, d_lse: None) -> tuple[Tensor | None, ...]:
    """Gradients of (q, k, v, offsets, launches, scale, backend)."""
    if d_out is None:
        return (None,) * 7
    options = (ctx.launches, ctx.scale, ctx.backend)
    return *_backward(d_out, *ctx.saved_tensors, *options), None, None, None, None


_backward = declare(
    "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor? out, Tensor? lse, "
    "Tensor offsets, int[] launches, float scale, str backend) -> (Tensor, Tensor, Tensor)",
    kernels={place: _backward_with(kernels) for place, kernels in KERNELS.items()},
    fake=_backward_fake,
)
_forward = declare(
    "attention(Tensor q, Tensor k, Tensor v, Tensor offsets, int[] launches, float scale, "
    "str backend) -> (Tensor, Tensor)",
    kernels={place: _forward_with(kernels) for place, kernels in KERNELS.items()},
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)
