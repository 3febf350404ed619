"""Layer norm of the rows that a branch keeps, and its gradient added into the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import measure, skip_unless_available
from benchmarks.shapes import KEPT_ROWS, draw_rows
from dinov2_fast.ops.layer_norm import (
    layer_norm_backward_,
    layer_norm_backward_reference_,
    layer_norm_forward,
    layer_norm_forward_reference,
)

OF_TORCH = "torch layer_norm"


def forward_of_torch(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, rows: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """Gather, normalise, convert."""
    return F.layer_norm(x.index_select(0, rows), weight.shape, weight, bias, eps).to(out_dtype)


def backward_of_torch(x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor) -> Callable[..., Any]:
    """Its backward from the gathered input, which it keeps, and the sum into the stream."""
    selected = x.index_select(0, rows)
    _, *statistics = torch.native_layer_norm(selected, weight.shape, weight, bias, 1e-6)

    def run(dx: Tensor, dy: Tensor, *_: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        gradient, *sums = torch.ops.aten.native_layer_norm_backward(
            dy.float(), selected, weight.shape, *statistics, weight, bias, [True] * 3
        )
        dx.index_add_(0, rows, gradient)
        return tuple(sums)

    return run


def contender(
    name: str, mode: str, x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor
) -> Callable[..., Any]:
    """What takes the arguments of `layer_norm_forward` or of `layer_norm_backward_`."""
    forward = mode == "forward"
    if name == OF_TORCH:
        return forward_of_torch if forward else backward_of_torch(x, rows, weight, bias)
    if name == "compiled reference":
        reference = layer_norm_forward_reference if forward else layer_norm_backward_reference_
        return torch.compile(reference, fullgraph=True)
    return partial(layer_norm_forward if forward else layer_norm_backward_, backend=name)


@pytest.mark.filterwarnings("default")  # inductor's own warnings are no failure of a measurement
@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "shape"), KEPT_ROWS)
@pytest.mark.parametrize(
    "backend", ["reference", "compiled reference", OF_TORCH, "native", "triton"]
)
def test_layer_norm(
    benchmark: Any,
    backend: str,
    device: str,
    shape: tuple[int, int, int],
    out_dtype: torch.dtype,
    mode: str,
):
    of_reference = backend in (OF_TORCH, "compiled reference")
    skip_unless_available("layer_norm", "reference" if of_reference else backend, device)
    num_tokens, num_rows, channels = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, channels, generator=generator).to(device)  # float32 stream
    dy = torch.randn(num_rows, channels, generator=generator).to(device, out_dtype)
    rows = draw_rows(num_tokens, device).rows
    weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)
    options = {"eps": 1e-6, "rows": rows, "out_dtype": out_dtype}
    y, rstd = layer_norm_forward(x, weight, bias, **options, backend="reference")
    run = contender(backend, mode, x, rows, weight, bias)
    if mode == "forward":
        # read x, write y
        bytes_per_element = x.element_size() + y.element_size()

        def work() -> object:
            return run(x, weight, bias, **options)
    else:
        # read dy, y and dx, write dx
        bytes_per_element = dy.element_size() + y.element_size() + 2 * x.element_size()

        def work() -> object:
            return run(x, dy, y, rstd, weight, bias, rows=rows)

    measure(
        benchmark,
        work,
        op="layer_norm",
        backend=backend,
        dtype=out_dtype,
        shape=shape,
        mode=mode,
        device=device,
        num_bytes=num_rows * channels * bytes_per_element,
    )
