"""The layer norm's kernels for a GPU at DINOv2's widths, on packs of global and local crops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_fast.ops.layer_norm import layer_norm_backward_, layer_norm_forward
from tests.inputs import randn, randperm
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
    inputs: list[Tensor], rows: Tensor, dy: Tensor, rebuild: bool, backend: str
) -> list[Tensor]:
    """y, rstd, dx added to x, dweight and dbias; y in the dtype of dy."""
    x, weight, bias = inputs
    options = {"eps": 1e-6, "rows": rows, "out_dtype": dy.dtype, "backend": backend}
    y, rstd = layer_norm_forward(x, weight, bias, **options)
    one, zero = torch.ones_like(weight), torch.zeros_like(bias)
    normalised = None if rebuild else layer_norm_forward(x, one, zero, **options)[0]
    dx = x.clone()
    options = {"rows": rows, "normalised": normalised, "backend": backend}
    return [y, rstd, dx, *layer_norm_backward_(dx, dy, y, rstd, weight, bias, **options)]


@pytest.mark.parametrize(("width", "types"), CASES, ids=str)
@pytest.mark.parametrize("rebuild", [False, True])
def test_kept_rows_of_a_pack_are_within_budget(
    width: int,
    types: tuple[torch.dtype, torch.dtype],
    rebuild: bool,
    kernels: str,
    device_of_kernels: str,
    num_images: int,
):
    tokens = num_images * (2 * 257 + 8 * 50) or 11
    x = 2 + randn(tokens, width, dtype=types[0], device=device_of_kernels, scale=3.0)
    weight = 1 + randn(width, device=device_of_kernels, seed=1, scale=0.1)
    bias = randn(width, device=device_of_kernels, seed=2, scale=0.1)
    rows = randperm(tokens, device=device_of_kernels)[: tokens * 3 // 5]
    dy = randn(rows.shape[0], width, dtype=types[1], device=device_of_kernels, seed=3)
    inputs = [x, weight, bias]
    found = outputs(inputs, rows, dy, rebuild, kernels)
    low = outputs(inputs, rows, dy, rebuild, "reference")
    wide = [tensor.double() for tensor in inputs]
    truth = outputs(wide, rows, dy.double(), rebuild, "reference")
    names = ("y", "rstd", "dx", "dweight", "dbias")
    for name, out, low_precision, exact in zip(names, found, low, truth, strict=True):
        assert_within_error_budget(out, low_precision=low_precision, truth=exact, name=name)


def test_sums_have_one_order(kernels: str, device_of_kernels: str):
    x = randn(3000 if device_of_kernels == "cuda" else 30, 384, device=device_of_kernels)
    inputs = [
        x,
        torch.ones(384, device=device_of_kernels),
        torch.zeros(384, device=device_of_kernels),
    ]
    rows = randperm(x.shape[0], device=device_of_kernels)
    dy = randn(*x.shape, device=device_of_kernels, seed=3)
    first, second = (outputs(inputs, rows, dy, True, kernels) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_dropped_rows_of_the_gradient_stay_bit_equal(kernels: str, device_of_kernels: str):
    dx = randn(40, 384, device=device_of_kernels)
    before, rows = dx.clone(), torch.arange(0, 40, 3, device=device_of_kernels)
    y = randn(rows.shape[0], 384, device=device_of_kernels, seed=1)
    weight, rstd = torch.ones(384, device=device_of_kernels), torch.ones_like(y[:, 0]).contiguous()
    zeros = torch.zeros_like(weight)
    layer_norm_backward_(dx, y, y, rstd, weight, zeros, rows=rows, backend=kernels)
    dropped = torch.ones(40, dtype=torch.bool, device=device_of_kernels)
    dropped[rows] = False
    assert torch.equal(dx[dropped], before[dropped])
