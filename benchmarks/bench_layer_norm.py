"""Layer norm of the rows that a branch keeps, and its gradient added into the residual stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness import measure, skip_unless_available
from benchmarks.shapes import KEPT_ROWS, draw_rows
from dinov2_fast.ops.layer_norm import layer_norm_backward_, layer_norm_forward


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "shape"), KEPT_ROWS)
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_layer_norm(
    benchmark: Any,
    backend: str,
    device: str,
    shape: tuple[int, int, int],
    out_dtype: torch.dtype,
    mode: str,
):
    skip_unless_available("layer_norm", backend, device)
    num_tokens, num_rows, channels = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, channels, generator=generator).to(device)  # float32 stream
    dy = torch.randn(num_rows, channels, generator=generator).to(device, out_dtype)
    rows = draw_rows(num_tokens, device).rows
    weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)
    options = {"rows": rows, "backend": backend}
    y, rstd = layer_norm_forward(x, weight, bias, eps=1e-6, out_dtype=out_dtype, **options)
    if mode == "forward":
        # read x, write y
        bytes_per_element = x.element_size() + y.element_size()

        def work() -> object:
            return layer_norm_forward(x, weight, bias, eps=1e-6, out_dtype=out_dtype, **options)
    else:
        # read dy, y and dx, write dx
        bytes_per_element = dy.element_size() + y.element_size() + 2 * x.element_size()

        def work() -> object:
            return layer_norm_backward_(x, dy, y, rstd, weight, bias, **options)

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
