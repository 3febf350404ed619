"""Calls of attention that its tests on CUDA make: cases, and tensors between NaN."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dinov2_fast.ops import _attention_kernels
from dinov2_fast.ops.attention import attention_backward, attention_forward
from dinov2_fast.packing import Pack
from tests.cuda import native_on_ptx
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget

Outputs = dict[str, Tensor]

HEAD_DIM, SCALE = 64, 0.125
GAP = 16  # elements of NaN after every row: rows still begin with a sector of 32 bytes
# Lengths of the sequences of queries and of keys, and heads.
Case = tuple[tuple[int, ...], tuple[int, ...], int]
CROPS: Case = ((257, 50), (257, 50), 1)  # a 224 px and a 98 px crop at patch 14
EDGES: Case = ((1, 2, 63, 64, 0, 65, 17), (1, 2, 63, 64, 0, 65, 17), 1)  # a tile, one more, primes
UNEQUAL: Case = ((3, 0, 70, 1, 5), (131, 7, 64, 0, 1), 2)  # no queries, no keys, fewer, more
SHORT: Case = ((1, 2, 50, 63, 0, 64), (1, 2, 50, 63, 0, 64), 1)  # one launch, a block each
LEFT: Case = ((264, 65, 261), (264, 65, 261), 1)  # 256 keys and 8 more; a warp's, one more; primes
# The most of one, few or none of the other.
LEFT_UNEQUAL: Case = ((264, 5, 0, 257), (3, 264, 257, 0), 2)
BOTH_LEFT: Case = ((257,), (258,), 1)  # of queries and keys, and a key that does not exist
BLOCKS: Case = ((128, 129, 65), (128, 129, 65), 1)  # the most of a block of queries, one more
MIXED: Case = (
    (129, 65, 0, 31, 264, 128),
    (129, 65, 0, 31, 264, 128),
    1,
)  # one launch, of any length
PATCHES: Case = ((256, 197), (256, 197), 1)  # whole tiles; 224 px at patch 16
# One launch, of problems that a CTA computes one after another: keys or queries left or none, last
# tiles that have a place of their own (257, 70, 197) or not, few rows after many.
WALK: Case = ((257, 70, 0, 128, 197, 5, 264), (257, 96, 7, 0, 197, 264, 2), 1)
# One launch for all; blocks of 256 keys and 9, 2 or no more.
PARTS: Case = ((66, 3, 0, 1, 2), (265, 258, 7, 1, 0), 1)
TWO_KERNELS: Case = ((3, 265), (265, 66), 1)  # one token too many for one kernel, on each side
MANY: Case = ((9, 2, 33, 1, 7), (9, 2, 33, 1, 7), 1)  # more runs than launches


def poisoned(x: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of [T, X, H, D] between NaN, before, after and between its rows; and all of it."""
    rows, width = x.shape[0], x[0].numel() if x.shape[0] else 0
    storage = torch.full((rows + 2, width + GAP), torch.nan, dtype=x.dtype)
    view = storage[1:-1, :width].unflatten(1, x.shape[1:]) if rows else x
    view.copy_(x)
    return view, storage


def make_inputs(case: Case, dtype: torch.dtype) -> Outputs:
    """Queries, keys and values out of tensors [T, 3, H, D], and the gradient of the output."""
    tokens = [sum(lengths) for lengths in case[:2]]
    qkv = [randn(t, 3, case[2], HEAD_DIM, dtype=dtype, seed=t) for t in tokens]
    d_out = randn(tokens[0], case[2], HEAD_DIM, dtype=dtype, seed=1)
    return {"q": qkv[0][:, 0], "k": qkv[1][:, 1], "v": qkv[1][:, 2], "d_out": d_out}


def run(
    case: Case,
    inputs: Outputs,
    scale: float = SCALE,
    backend: str = "native",
    deterministic: bool | None = True,
) -> Outputs:
    """Forward and backward; all that is read or written lies between NaN, which stay."""
    queries, keys = (Pack.from_lengths(lengths) for lengths in case[:2])
    q, k, v, d_out = (inputs[name] for name in ("q", "k", "v", "d_out"))
    d_out = poisoned(d_out.unsqueeze(1))[0][:, 0]
    if case[0] == case[1]:
        q, k, v = poisoned(torch.stack([q, k, v], 1))[0].unbind(1)
    else:
        q = poisoned(q.unsqueeze(1))[0][:, 0]
        k, v = poisoned(torch.stack([k, v], 1))[0].unbind(1)
    options = {"scale": scale, "q_pack": queries, "backend": backend}
    out, lse = attention_forward(q, k, v, keys, **options)
    nothing = torch.full_like(k, torch.nan)
    d_q, storage = poisoned(torch.full_like(q, torch.nan).unsqueeze(1))
    d_kv, kv_storage = poisoned(torch.stack([nothing, nothing], 1))
    gradients = {"d_q": d_q[:, 0], "d_k": d_kv[:, 0], "d_v": d_kv[:, 1]}
    options["deterministic"] = deterministic
    attention_backward(d_out, q, k, v, lse, keys, out=out, **gradients, **options)
    outputs = {name: tensor.clone() for name, tensor in gradients.items()}
    d_q.fill_(torch.nan)
    d_kv.fill_(torch.nan)
    assert storage.isnan().all()
    assert kv_storage.isnan().all()
    return {"out": out, "lse": lse, **outputs}


def execute(
    case: Case,
    inputs: Outputs,
    scale: float = SCALE,
    deterministic: bool | None = True,
    **options: Any,
) -> tuple[Outputs, list[Any]]:
    """What the CUDA kernels compute, and the results of their launches."""
    with native_on_ptx.native_on_ptx(**options) as results:
        return run(case, inputs, scale, deterministic=deterministic), results


def execute_triton(case: Case, inputs: Outputs, scale: float = SCALE) -> tuple[Outputs, list[Any]]:
    """As `execute`, of Triton's kernels."""
    from tools.simt.triton_launch import triton_on_cpu

    def as_asked(op: str, q: Tensor, backend: str, **_: Any) -> str:
        return backend

    with (
        mock.patch.object(_attention_kernels, "choose_backend", as_asked),
        triton_on_cpu(80) as results,
    ):
        return run(case, inputs, scale, "triton"), results


def assert_matches_reference(case: Case, inputs: Outputs, out: Outputs, scale: float = SCALE):
    """Errors are within twice those of the reference in the same type."""
    low = run(case, inputs, scale, "reference")
    truth = run(case, {name: x.double() for name, x in inputs.items()}, scale, "reference")
    for name, tensor in out.items():
        assert_within_error_budget(tensor, low_precision=low[name], truth=truth[name], name=name)


def equal(a: Outputs, b: Outputs) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def flops(result: Any) -> int:
    """Of matrix products, all warps."""
    return sum(result.flops.get(inst.line, 0) * count for inst, count in result.instructions)


def adds(result: Any) -> bool:
    """Whether a launch added to memory in any order."""
    return any(count and inst.op in ("red", "atom") for inst, count in result.instructions)
