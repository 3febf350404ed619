"""A branch's rows added into the residual stream in place, and their gradient gathered from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness import measure, skip_unless_available
from benchmarks.shapes import KEPT_ROWS, draw_rows
from dinov2_fast.ops.stochastic_depth import gather_scaled, scatter_add_scaled_


@pytest.mark.parametrize("mode", ["scatter", "gather"])
@pytest.mark.parametrize("branch_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "shape"), KEPT_ROWS)
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_stochastic_depth(
    benchmark: Any,
    backend: str,
    device: str,
    shape: tuple[int, int, int],
    branch_dtype: torch.dtype,
    mode: str,
):
    skip_unless_available("stochastic_depth", backend, device)
    num_tokens, num_rows, channels = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, channels, generator=generator).to(device)  # float32 stream
    residual = torch.randn(num_rows, channels, generator=generator).to(device, branch_dtype)
    kept = draw_rows(num_tokens, device)
    rows, row_scale = kept.rows, kept.row_scale
    gamma = torch.full((channels,), 1e-5, device=device)
    if mode == "scatter":
        # read residual and x, write x
        bytes_per_element = residual.element_size() + 2 * x.element_size()

        def work() -> object:
            return scatter_add_scaled_(x, residual, rows, row_scale, gamma, backend=backend)
    else:
        # read the stream's gradient, write the branch's
        bytes_per_element = x.element_size() + residual.element_size()

        def work() -> object:
            return gather_scaled(x, rows, row_scale, out_dtype=branch_dtype, backend=backend)

    measure(
        benchmark,
        work,
        op="stochastic_depth",
        backend=backend,
        dtype=branch_dtype,
        shape=shape,
        mode=mode,
        device=device,
        num_bytes=num_rows * channels * bytes_per_element,
    )
