"""Stochastic depth's kernels for a GPU at DINOv2's widths, on packs of crops of both sizes."""

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
    width: int,
    types: tuple[torch.dtype, torch.dtype],
    kernels: str,
    device_of_kernels: str,
    num_images: int,
):
    tokens = num_images * (2 * 257 + 8 * 50) or 37
    x = 1 + randn(
        tokens, width, dtype=types[0], device=device_of_kernels
    )  # sums that do not cancel
    rows = randperm(tokens, device=device_of_kernels)[: tokens * 3 // 5]
    residual = randn(rows.shape[0], width, dtype=types[1], device=device_of_kernels, seed=1)
    scale = torch.full((rows.shape[0],), 5 / 3, device=device_of_kernels)
    gamma = randn(width, device=device_of_kernels, seed=2)
    found = outputs(x, residual, rows, scale, gamma, kernels)
    low = outputs(x, residual, rows, scale, gamma, "reference")
    truth = outputs(
        x.double(), residual.double(), rows, scale.double(), gamma.double(), "reference"
    )
    for name, out, one, exact in zip(("x", "g", "sums"), found, low, truth, strict=True):
        assert_within_error_budget(out, low_precision=one, truth=exact, name=name)
    again = outputs(x, residual, rows, scale, gamma, kernels)
    assert all(map(torch.equal, found, again))


def test_gradients_of_a_scatter_are_within_budget(
    kernels: str, device_of_kernels: str, num_images: int
):
    tokens = num_images * (2 * 257 + 8 * 50) or 37
    rows = randperm(tokens, device=device_of_kernels)[: tokens * 3 // 5]
    originals = [
        randn(tokens, 384, device=device_of_kernels),
        randn(rows.shape[0], 384, device=device_of_kernels, seed=1),
        randn(384, device=device_of_kernels, seed=2),
    ]
    scale = torch.full((rows.shape[0],), 5 / 3, device=device_of_kernels)

    def gradients(dtype: torch.dtype, backend: str) -> list[Tensor]:
        x, residual, gamma = inputs = leaves(*originals, dtype=dtype)
        out = scatter_add_scaled(x, residual, rows, scale.to(dtype), gamma, backend=backend)
        incoming = 1 + randn(*out.shape, device=device_of_kernels, seed=3)
        return list(torch.autograd.grad(out, inputs, incoming.to(dtype)))

    found, low = (gradients(torch.float32, backend) for backend in (kernels, "reference"))
    truth = gradients(torch.float64, "reference")
    for name, out, one, exact in zip(("dx", "dresidual", "dgamma"), found, low, truth, strict=True):
        assert_within_error_budget(out, low_precision=one, truth=exact, name=name)
