"""SwiGLU at the shapes of DINOv2, against its reference in eager mode and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import gradient_of, measure, skip_unless_available
from benchmarks.shapes import GATED_HIDDEN
from dinov2_fast.ops.swiglu import swiglu, swiglu_backward_, swiglu_reference


def contender(name: str) -> Callable[[Tensor], Tensor]:
    if name == "compiled reference":
        return torch.compile(swiglu_reference, fullgraph=True)
    return lambda x12: swiglu(x12, backend=name)


@pytest.mark.filterwarnings("default")  # inductor's own warnings are no failure of a measurement
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "shape"), GATED_HIDDEN)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "shape"), GATED_HIDDEN)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_swiglu_backward_in_place(
    benchmark: Any, backend: str, device: str, shape: tuple[int, int], dtype: torch.dtype
):
    """Gradient, activation and the sums for the bias, as a feed-forward branch takes them."""
    skip_unless_available("swiglu", backend, device)
    rows, width = shape
    generator = torch.Generator().manual_seed(0)
    given = [
        torch.randn(rows, columns, generator=generator).to(device, dtype)
        for columns in (width // 2, width)
    ]
    dh, x12 = (torch.empty_like(tensor) for tensor in given)
    measure(
        benchmark,
        lambda: swiglu_backward_(dh, x12, backend=backend),
        op="swiglu",
        backend=backend,
        dtype=dtype,
        shape=shape,
        mode="backward in place",
        device=device,
        num_bytes=3 * x12.numel() * x12.element_size(),  # x12 -> dx12 and dh -> h
        prepare=lambda: (dh.copy_(given[0]), x12.copy_(given[1])),
    )
