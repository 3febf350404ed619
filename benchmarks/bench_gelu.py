"""GELU at the shapes of DINOv2, against its reference in eager mode and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import gradient_of, measure, skip_unless_available
from benchmarks.shapes import HIDDEN
from dinov2_fast.ops.gelu import gelu, gelu_backward_, gelu_reference


def contender(name: str) -> Callable[[Tensor], Tensor]:
    if name == "compiled reference":
        return torch.compile(gelu_reference, fullgraph=True)
    return lambda x: gelu(x, backend=name)


@pytest.mark.filterwarnings("default")  # inductor's own warnings are no failure of a measurement
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "shape"), HIDDEN)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "shape"), HIDDEN)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_gelu_backward_in_place(
    benchmark: Any, backend: str, device: str, shape: tuple[int, int], dtype: torch.dtype
):
    """Gradient, activation and the sums for the bias, as a feed-forward branch takes them."""
    skip_unless_available("gelu", backend, device)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]
    da, x = (torch.empty_like(tensor) for tensor in given)
    measure(
        benchmark,
        lambda: gelu_backward_(da, x, backend=backend),
        op="gelu",
        backend=backend,
        dtype=dtype,
        shape=shape,
        mode="backward in place",
        device=device,
        num_bytes=4 * x.numel() * x.element_size(),  # da -> a and x -> dx
        prepare=lambda: (da.copy_(given[0]), x.copy_(given[1])),
    )
