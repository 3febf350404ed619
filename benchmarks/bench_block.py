"""A whole transformer block, forward and backward: branches that own their memory, and modules.

The stream and its gradient are copied once each, since both belong to the benchmark; inside a
network only the first block copies. Rows also state the bytes kept for the backward pass, of every
token of the stream and channel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import CPU_ROW, measure, skip_unless_available
from benchmarks.shapes import (
    CPU_IMAGES,
    DROP_RATIO,
    FULL,
    HEAD_DIM,
    WIDTHS,
    crop_groups,
    num_tokens,
)
from dinov2_fast.bench.saved import saved_bytes
from dinov2_fast.nn import Block
from dinov2_fast.packing import Pack

# Backend -> DINOV2_FAST_BLOCK and DINOV2_FAST_BACKEND.
CONTENDERS = {"modules": ("plain", "reference"), "native": ("auto", "native")}

# (images, C): all crops of the images in one pack.
CASES = [
    pytest.param((1, WIDTHS["ViT-S"]), id="ViT-S, 1 image"),
    *[pytest.param((CPU_IMAGES, width), id=name, marks=FULL) for name, width in WIDTHS.items()],
]

pytestmark = CPU_ROW


def num_flops(images: int, width: int, drop_ratio: float) -> int:
    """Products of the layers three times; of attention two forward and five backward."""
    groups = crop_groups(images, drop_ratio)
    layers = 3 * 2 * 12 * width**2 * num_tokens(images, drop_ratio)
    return layers + sum(7 * 2 * width * count * tokens**2 for count, tokens in groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("drop_ratio", [0.0, DROP_RATIO])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", CONTENDERS)
def test_block(
    benchmark: Any,
    backend: str,
    case: tuple[int, int],
    drop_ratio: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
):
    (images, width), (block, ops) = case, CONTENDERS[backend]
    skip_unless_available("attention", ops, "cpu")
    monkeypatch.setenv("DINOV2_FAST_BLOCK", block)
    monkeypatch.setenv("DINOV2_FAST_BACKEND", ops)
    torch.manual_seed(0)
    options: dict[str, Any] = {"qkv_bias": True, "init_values": 1e-5, "drop_path": drop_ratio}
    layer = Block(width, width // HEAD_DIM, **options).train()
    pack = Pack.from_groups(crop_groups(images))
    x = torch.randn(pack.num_tokens, width).requires_grad_()
    incoming = torch.randn(pack.num_tokens, width)
    leaves = (x, *layer.parameters())

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return layer(x, pack, generator=torch.Generator().manual_seed(1))

    kept = saved_bytes(layer, forward)
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    measure(
        benchmark,
        lambda: torch.autograd.grad(forward(), leaves, incoming),
        op="block",
        backend=backend,
        dtype=dtype,
        shape=(pack.num_tokens, num_tokens(images, drop_ratio), width),
        mode="forward+backward",
        device="cpu",
        # stream and gradient read and written; parameters read twice, their gradients written
        num_bytes=4 * (4 * x.numel() + 3 * parameters),
        num_flops=num_flops(images, width, drop_ratio),
    )
    benchmark.extra_info.update(saved_bytes_per_token_and_channel=kept / x.numel())
