"""SwiGLU at the shapes of DINOv2, against its reference in eager mode and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import CPU_ROW, GPU_ROW, gradient_of, measure, skip_unless_available
from dinov2_fast.ops.swiglu import swiglu, swiglu_reference

# (rows, 2F): tokens of a pack, and the width of w12's output.
SHAPES = {
    "cpu": [
        (394, 8192),  # ViT-g: one 224 px crop and a few local ones
        (1028, 5504),  # ViT-L with SwiGLU: four 224 px crops
    ],
    "cuda": [
        (32 * 2 * 257 + 32 * 8 * 50, 8192),  # ViT-g, batch 32: all crops in one pack
        (64 * 2 * 257 + 64 * 8 * 50, 5504),  # ViT-L with SwiGLU, batch 64
    ],
}
ROWS = {"cpu": CPU_ROW, "cuda": GPU_ROW}
CASES = [
    pytest.param(device, shape, marks=ROWS[device], id=f"{device}-{shape[0]}x{shape[1]}")
    for device, shapes in SHAPES.items()
    for shape in shapes
]


def contender(name: str) -> Callable[[Tensor], Tensor]:
    if name == "compiled reference":
        return torch.compile(swiglu_reference, fullgraph=True)
    return lambda x12: swiglu(x12, backend=name)


@pytest.mark.filterwarnings("default")  # inductor's own warnings are no failure of a measurement
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "shape"), CASES)
@pytest.mark.parametrize("backend", ["reference", "compiled reference", "native", "triton"])
def test_swiglu(
    benchmark: Any, backend: str, device: str, shape: tuple[int, int], dtype: torch.dtype, mode: str
):
    skip_unless_available("swiglu", backend.removeprefix("compiled "), device)
    rows, width = shape
    generator = torch.Generator().manual_seed(0)
    x12 = torch.randn(rows, width, generator=generator).to(device, dtype)
    dh = torch.randn(rows, width // 2, generator=generator).to(device, dtype)
    run = contender(backend)
    element = x12.element_size()
    if mode == "forward":
        work, elements = lambda: run(x12), x12.numel() * 3 // 2  # read 2F, write F
    else:
        leaf = x12.requires_grad_()
        # forward, then read dh and x12 and write dx12
        work, elements = lambda: gradient_of(run, leaf, dh), x12.numel() * (3 + 5) // 2
    measure(
        benchmark,
        work,
        op="swiglu",
        backend=backend,
        dtype=dtype,
        shape=shape,
        mode=mode,
        device=device,
        num_bytes=elements * element,
    )
