"""Packed attention at the lengths of DINOv2's crops, against torch's own and the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import gradient_of, measure, skip_unless_available
from benchmarks.shapes import HEAD_DIM, HEADS
from dinov2_fast.ops.attention import attention
from dinov2_fast.packing import Pack


def contender(name: str, shape: tuple[int, int, int], device: str) -> Callable[[Tensor], Tensor]:
    """Attention of qkv [T, 3, H, D] to [T, H, D]."""
    sequences, heads, length = shape
    pack = Pack.from_groups([(sequences, length)], device)

    def of_torch(qkv: Tensor) -> Tensor:
        q, k, v = (
            x.view(sequences, length, heads, HEAD_DIM).transpose(1, 2) for x in qkv.unbind(1)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

    if name == "torch sdpa":
        return of_torch

    def of_ours(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(1)
        return attention(q, k, v, pack, backend=name)

    return of_ours


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "shape"), HEADS)
@pytest.mark.parametrize("backend", ["reference", "torch sdpa", "native", "triton", "flash_attn"])
def test_attention(
    benchmark: Any,
    backend: str,
    device: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    mode: str,
):
    ours = "reference" if backend == "torch sdpa" else backend
    skip_unless_available("attention", ours, device, dtype)
    sequences, heads, length = shape
    tokens = sequences * length
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, 3, heads, HEAD_DIM, generator=generator).to(device, dtype)
    d_out = torch.randn(tokens, heads, HEAD_DIM, generator=generator).to(device, dtype)
    run = contender(backend, shape, device)
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
        num_flops=2 * products * length * tokens * heads * HEAD_DIM,
    )
