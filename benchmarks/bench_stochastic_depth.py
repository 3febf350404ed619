"""A branch's rows added into the residual stream in place, and their gradient gathered from it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.harness import measure, skip_unless_available
from benchmarks.shapes import KEPT_ROWS, draw_rows
from dinov2_fast.ops.stochastic_depth import (
    gather_scaled,
    gather_scaled_reference,
    scatter_add_scaled_,
    scatter_add_scaled_reference_,
)


def contender(name: str, mode: str) -> Callable[..., object]:
    if name == "compiled reference":
        scatter, gather = scatter_add_scaled_reference_, gather_scaled_reference
        return torch.compile(scatter if mode == "scatter" else gather, fullgraph=True)
    return partial(scatter_add_scaled_ if mode == "scatter" else gather_scaled, backend=name)


@pytest.mark.filterwarnings("default")  # inductor's own warnings are no failure of a measurement
@pytest.mark.parametrize("mode", ["scatter", "gather"])
@pytest.mark.parametrize("branch_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "shape"), KEPT_ROWS)
@pytest.mark.parametrize("backend", ["reference", "compiled reference", "native", "triton"])
def test_stochastic_depth(
    benchmark: Any,
    backend: str,
    device: str,
    shape: tuple[int, int, int],
    branch_dtype: torch.dtype,
    mode: str,
):
    skip_unless_available("stochastic_depth", backend.removeprefix("compiled "), device)
    num_tokens, num_rows, channels = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, channels, generator=generator).to(device)  # float32 stream
    residual = torch.randn(num_rows, channels, generator=generator).to(device, branch_dtype)
    kept = draw_rows(num_tokens, device)
    rows, row_scale = kept.rows, kept.row_scale
    gamma = torch.full((channels,), 1e-5, device=device)
    run = contender(backend, mode)
    if mode == "scatter":
        # read residual and x, write x
        bytes_per_element = residual.element_size() + 2 * x.element_size()

        def work() -> object:
            return run(x, residual, rows, row_scale, gamma)
    else:
        # read the stream's gradient, write the branch's
        bytes_per_element = x.element_size() + residual.element_size()

        def work() -> object:
            return run(x, rows, row_scale, out_dtype=branch_dtype)

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
