"""Sinkhorn-Knopp, three iterations, against its reference in eager mode and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.harness import measure, skip_unless_available
from benchmarks.shapes import SCORES
from dinov2_fast.ops.sinkhorn import sinkhorn, sinkhorn_reference

ITERATIONS = 3


@pytest.mark.filterwarnings("default")  # inductor's own warnings are no failure of a measurement
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "shape"), SCORES)
@pytest.mark.parametrize("backend", ["reference", "compiled reference", "native", "triton"])
def test_sinkhorn(
    benchmark: Any, backend: str, device: str, shape: tuple[int, int], dtype: torch.dtype
):
    skip_unless_available("sinkhorn", backend.removeprefix("compiled "), device)
    logits = (0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(
        device, dtype
    )
    options = {"temperature": 0.05, "num_iterations": ITERATIONS, "group": None}
    work: Callable[[], object]
    if backend == "compiled reference":
        compiled = torch.compile(sinkhorn_reference, fullgraph=True)
        work = lambda: compiled(logits, **options)  # noqa: E731
    else:
        work = lambda: sinkhorn(logits, **options, backend=backend)  # noqa: E731
    measure(
        benchmark,
        work,
        op="sinkhorn",
        backend=backend,
        dtype=dtype,
        shape=shape,
        mode="forward",
        device=device,
        # the first sums of columns read the scores, then every iteration does
        num_bytes=(1 + ITERATIONS) * logits.numel() * logits.element_size(),
    )
