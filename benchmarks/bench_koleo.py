"""KoLeo over the images of one process, against its reference in eager mode and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness import CPU_ROW, GPU_ROW, gradient_of, measure, skip_unless_available
from dinov2_fast.ops.koleo import koleo, koleo_reference

# (images of a process, channels): ViT-S and ViT-L at the recipe's batch sizes.
SHAPES = [(64, 384), (128, 1024)]


@pytest.mark.filterwarnings("default")  # inductor's own warnings are no failure of a measurement
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=CPU_ROW), pytest.param("cuda", marks=GPU_ROW)]
)
@pytest.mark.parametrize("backend", ["reference", "compiled reference", "native", "triton"])
def test_koleo(benchmark: Any, backend: str, device: str, shape: tuple[int, int]):
    skip_unless_available("koleo", backend.removeprefix("compiled "), device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device).requires_grad_()
    compiled = torch.compile(koleo_reference, fullgraph=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        return compiled(x, eps=1e-8) if "compiled" in backend else koleo(x, backend=backend)

    measure(
        benchmark,
        lambda: gradient_of(run, x, torch.ones((), device=device)),
        op="koleo",
        backend=backend,
        dtype=torch.float32,
        shape=shape,
        mode="forward+backward",
        device=device,
        num_bytes=2 * x.numel() * x.element_size(),
    )
