"""Stochastic depth's Triton kernels at DINOv2's widths, on packs of global and local crops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_fast.ops.stochastic_depth import gather_scaled, scatter_add_scaled, scatter_add_scaled_
from tests.inputs import leaves, randn, randperm
from tests.tolerance import assert_within_error_budget

pytestmark = pytest.mark.gpu

# Types of the residual stream, and of what the branch works in.
TYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
# Every pair at the width of ViT-S, and what bf16 training has at those of B, L and g.
CASES = [(384, types) for types in TYPE_PAIRS] + [(w, TYPE_PAIRS[1]) for w in (768, 1024, 1536)]


def outputs(
    x: Tensor, residual: Tensor, rows: Tensor, scale: Tensor, gamma: Tensor, backend: str
) -> list[Tensor]:
    """Stream after the scatter; gradient rows and their sums."""
    out = x.clone()
    scatter_add_scaled_(out, residual, rows, scale, gamma, backend=backend)
    return [out, *gather_scaled(x, rows, scale, out_dtype=residual.dtype, backend=backend)]


@pytest.mark.parametrize(("width", "types"), CASES, ids=str)
def test_kept_rows_of_a_pack_are_within_budget(
    width: int, types: tuple[torch.dtype, torch.dtype], triton_device: str, num_images: int
):
    tokens = num_images * (2 * 257 + 8 * 50) or 37
    x = 1 + randn(tokens, width, dtype=types[0], device=triton_device)  # sums that do not cancel
    rows = randperm(tokens, device=triton_device)[: tokens * 3 // 5]
    residual = randn(rows.shape[0], width, dtype=types[1], device=triton_device, seed=1)
    scale = torch.full((rows.shape[0],), 5 / 3, device=triton_device)
    gamma = randn(width, device=triton_device, seed=2)
    found = outputs(x, residual, rows, scale, gamma, "triton")
    low = outputs(x, residual, rows, scale, gamma, "reference")
    truth = outputs(
        x.double(), residual.double(), rows, scale.double(), gamma.double(), "reference"
    )
    for name, out, one, exact in zip(("x", "g", "sums"), found, low, truth, strict=True):
        assert_within_error_budget(out, low_precision=one, truth=exact, name=name)
    again = outputs(x, residual, rows, scale, gamma, "triton")
    assert all(map(torch.equal, found, again))


def test_gradients_of_a_scatter_are_within_budget(triton_device: str, num_images: int):
    tokens = num_images * (2 * 257 + 8 * 50) or 37
    rows = randperm(tokens, device=triton_device)[: tokens * 3 // 5]
    originals = [
        randn(tokens, 384, device=triton_device),
        randn(rows.shape[0], 384, device=triton_device, seed=1),
        randn(384, device=triton_device, seed=2),
    ]
    scale = torch.full((rows.shape[0],), 5 / 3, device=triton_device)

    def gradients(dtype: torch.dtype, backend: str) -> list[Tensor]:
        x, residual, gamma = inputs = leaves(*originals, dtype=dtype)
        out = scatter_add_scaled(x, residual, rows, scale.to(dtype), gamma, backend=backend)
        incoming = 1 + randn(*out.shape, device=triton_device, seed=3)
        return list(torch.autograd.grad(out, inputs, incoming.to(dtype)))

    found, low = (gradients(torch.float32, backend) for backend in ("triton", "reference"))
    truth = gradients(torch.float64, "reference")
    for name, out, one, exact in zip(("dx", "dresidual", "dgamma"), found, low, truth, strict=True):
        assert_within_error_budget(out, low_precision=one, truth=exact, name=name)
