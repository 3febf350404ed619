"""GELU at the shapes of DINOv2, against its reference in eager mode and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import CPU_ROW, GPU_ROW, gradient_of, measure, skip_unless_available
from dinov2_fast.ops.gelu import gelu, gelu_reference

# (rows, F): kept tokens of a pack, and the hidden width.
CASES = [
    pytest.param("cpu", (2742, 1536), marks=CPU_ROW, id="cpu-ViT-S"),
    pytest.param("cuda", (64 * 2 * 257 + 64 * 8 * 50, 4096), marks=GPU_ROW, id="cuda-ViT-L"),
]


def contender(name: str) -> Callable[[Tensor], Tensor]:
    if name == "compiled reference":
        return torch.compile(gelu_reference, fullgraph=True)
    return lambda x: gelu(x, backend=name)


@pytest.mark.filterwarnings("default")  # inductor's own warnings are no failure of a measurement
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "shape"), CASES)
@pytest.mark.parametrize("backend", ["reference", "compiled reference", "native", "triton"])
def test_gelu(
    benchmark: Any, backend: str, device: str, shape: tuple[int, int], dtype: torch.dtype, mode: str
):
    skip_unless_available("gelu", backend.removeprefix("compiled "), device)
    generator = torch.Generator().manual_seed(0)
    x, da = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    run = contender(backend)
    passes = 2 if mode == "forward" else 5  # x -> a; then da, x -> dx
    leaf = x.requires_grad_(mode != "forward")
    measure(
        benchmark,
        (lambda: run(x)) if mode == "forward" else (lambda: gradient_of(run, leaf, da)),
        op="gelu",
        backend=backend,
        dtype=dtype,
        shape=shape,
        mode=mode,
        device=device,
        num_bytes=passes * x.numel() * x.element_size(),
    )
