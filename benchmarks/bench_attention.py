"""Packed attention at the lengths of DINOv2's crops, against torch's own and the reference.

The reference materialises its weights, so on the CPU the two are what attention must not be slower
than. With --full, neither is it at any other length or head dimension:

    pytest benchmarks/bench_attention.py --benchmark-only --full -k cpu
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import gradient_of, measure, skip_unless_available
from benchmarks.shapes import HEAD_DIM, HEADS, cases
from dinov2_fast.ops.attention import attention, attention_reference
from dinov2_fast.packing import Pack

# (sequences, heads, tokens, D) of about as many tokens as the crops of a step, besides HEADS; some
# are small altogether, down to a call that takes no longer than what surrounds its kernel.
# Operations grow with the length, what surrounds them with the number of sequences and with D:
# every length has a row at the usual D, every other D a short, a middling and a long one. The
# lengths: less than a vector, whole vectors, an odd number of rows, and crops of 84, 140, 196 and
# 336 px.
SWEEP_TOKENS = 1200
LENGTHS = {
    HEAD_DIM: (1, 2, 4, 8, 16, 25, 37, 101, 197, 577),
    32: (1, 16, 257),
    80: (4, 50, 577),
    128: (1, 37, 257),
}
SWEEP = cases(
    full=[
        (max(SWEEP_TOKENS // length, 1), 6, length, head_dim)
        for head_dim, lengths in LENGTHS.items()
        for length in lengths
    ]
    + [(sequences, 6, 16, HEAD_DIM) for sequences in (1, 2, 5, 20)]
)


def contender(
    name: str, shape: tuple[int, int, int, int], device: str
) -> Callable[[Tensor], Tensor]:
    """Attention of qkv [T, 3, H, D] to [T, H, D]."""
    sequences, heads, length, head_dim = shape
    pack = Pack.from_groups([(sequences, length)], device)

    def of_torch(qkv: Tensor) -> Tensor:
        q, k, v = (
            x.view(sequences, length, heads, head_dim).transpose(1, 2) for x in qkv.unbind(1)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

    if name == "torch sdpa":
        return of_torch

    def of_reference(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(1)
        return attention_reference(q, k, v, pack, scale=head_dim**-0.5)

    if name == "compiled reference":
        return torch.compile(of_reference, fullgraph=True)

    def of_ours(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(1)
        return attention(q, k, v, pack, backend=name)

    return of_ours


# The uppermost changes first: contenders for one row are measured one after the other.
@pytest.mark.filterwarnings("default")  # inductor's own warnings are no failure of a measurement
@pytest.mark.parametrize(
    "backend",
    ["reference", "compiled reference", "torch sdpa", "native", "triton", "flash_attn"],
)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "shape"), HEADS + SWEEP)
def test_attention(
    benchmark: Any,
    backend: str,
    device: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    mode: str,
):
    ours = "reference" if backend in ("compiled reference", "torch sdpa") else backend
    skip_unless_available("attention", ours, device, dtype)
    sequences, heads, length, head_dim = (*shape, HEAD_DIM)[:4]
    tokens = sequences * length
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, 3, heads, head_dim, generator=generator).to(device, dtype)
    d_out = torch.randn(tokens, heads, head_dim, generator=generator).to(device, dtype)
    run = contender(backend, (sequences, heads, length, head_dim), device)
    products, tensors = (2, 4) if mode == "forward" else (7, 12)
    leaf = qkv.requires_grad_(mode != "forward")
    measure(
        benchmark,
        (lambda: run(qkv)) if mode == "forward" else (lambda: gradient_of(run, leaf, d_out)),
        op="attention",
        backend=backend,
        dtype=dtype,
        shape=shape,
        mode=mode,
        device=device,
        num_bytes=tensors * d_out.numel() * d_out.element_size(),
        num_flops=2 * products * length * tokens * heads * head_dim,
    )
