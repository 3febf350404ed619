"""Sinkhorn-Knopp's kernels for a GPU, with many prototypes."""

from __future__ import annotations

import pytest
import torch

from dinov2_fast.ops.sinkhorn import sinkhorn
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(128, 65536), (1031, 4097), (1, 1), (17, 131)], ids=str)
def test_vectors_are_within_budget(
    shape: tuple[int, int], dtype: torch.dtype, kernels: str, device_of_kernels: str
):
    if device_of_kernels == "cpu" and shape[1] > 1000:
        shape = (shape[0] % 30, shape[1] % 3000)
    logits = randn(*shape, dtype=dtype, device=device_of_kernels, scale=0.2)
    found = sinkhorn(logits, temperature=0.04, backend=kernels)
    low = sinkhorn(logits, temperature=0.04, backend="reference")
    truth = sinkhorn(logits.double(), temperature=0.04, backend="reference")
    for name, out, one, exact in zip(("log_u", "log_v"), found, low, truth, strict=True):
        assert_within_error_budget(out, low_precision=one, truth=exact, name=name)
    again = sinkhorn(logits, temperature=0.04, backend=kernels)
    assert all(map(torch.equal, found, again))
