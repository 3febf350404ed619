"""Calls that reach every instance of the attention kernels."""

from __future__ import annotations

import functools

import torch

from dinov2_fast.ops.attention import attention_backward, attention_forward
from dinov2_fast.packing import Pack
from tools.kernel_report import flash_attention
from tools.kernel_report.cases import Calls, Case, Place, Types, normal


def run_attention(
    sizes: tuple[int, ...],
    types: Types,
    place: Place,
    backend: str,
    *,
    deterministic: bool = False,
) -> Calls:
    """Sequences of those lengths with one head: views of one qkv tensor, and of its gradient."""
    pack = Pack.from_lengths(sizes, torch.get_default_device())
    tokens, width = pack.num_tokens, flash_attention.HEAD_DIM
    qkv = place(normal(tokens, 3, 1, width).to(types[0]))
    q, k, v = qkv.unbind(1)
    scale = width**-0.5
    out, lse = attention_forward(q, k, v, pack, scale=scale, backend=backend)
    yield "forward", {"out": out, "lse": lse}
    d_out = place(normal(tokens, 1, width, seed=1).to(types[0]))
    d_q, d_k, d_v = torch.empty_like(qkv).unbind(1)
    attention_backward(
        d_out,
        *(q, k, v, lse, pack),
        scale=scale,
        d_q=d_q,
        d_k=d_k,
        d_v=d_v,
        out=out,
        deterministic=deterministic,
        backend=backend,
    )
    yield "backward", {"d_q": d_q, "d_k": d_k, "d_v": d_v}


run_in_order = functools.partial(run_attention, deterministic=True)

# One token too many for one kernel.
LONG = (265,)

# One head. What FlashAttention was counted at in one type; the other type's instances at the least.
CASES = {
    "attention": [
        *(
            Case(run_attention, sizes, (torch.bfloat16,))
            for sizes in flash_attention.CASES.values()
        ),
        Case(run_in_order, LONG, (torch.bfloat16,)),
        *(Case(run_attention, sizes, (torch.float16,)) for sizes in [(50,), (257,), LONG]),
        Case(run_in_order, LONG, (torch.float16,)),
    ]
}
