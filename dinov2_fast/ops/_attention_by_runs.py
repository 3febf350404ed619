"""Attention outside autograd in plain PyTorch: a few products per run of equal sequences."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dinov2_fast.ops._checks import accumulation_dtype
from dinov2_fast.packing import Pack


def forward(
    q: Tensor, k: Tensor, v: Tensor, queries: Pack, pack: Pack, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [Tq, H, D] and lse [H, Tq], the latter at least in float32."""
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


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor | None,
    queries: Pack,
    pack: Pack,
    scale: float,
    *,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
) -> None:
    """Write the gradients of queries, keys and values; without lse, by the softmax again."""
    for count, rows, keys in _runs(queries, pack):
        q_i, d_out_i = _each(q[rows], count), _each(d_out[rows], count)
        k_i, v_i = _each(k[keys], count), _each(v[keys], count)
        scores = _run_scores(q[rows], k[keys], count, scale)  # [S_i, H, n, m]
        if lse is None:
            weights = scores.softmax(dim=-1)
        else:
            lse_i = _each(lse[:, rows].t(), count).transpose(1, 2)  # [S_i, H, n]
            weights = (scores - lse_i.unsqueeze(-1)).exp().to(q.dtype)
        d_weights = torch.einsum("snhd,smhd->shnm", d_out_i, v_i)
        mean = (weights * d_weights).sum(dim=-1, keepdim=True)
        d_scores = weights * (d_weights - mean) * scale
        d_v[keys] = torch.einsum("shnm,snhd->smhd", weights, d_out_i).flatten(0, 1)
        d_q[rows] = torch.einsum("shnm,smhd->snhd", d_scores, k_i).flatten(0, 1)
        d_k[keys] = torch.einsum("shnm,snhd->smhd", d_scores, q_i).flatten(0, 1)


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
