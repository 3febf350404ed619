"""SwiGLU's kernels for a GPU at DINOv2's widths, on packs of global and local crops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_fast.ops.swiglu import swiglu, swiglu_backward_
from tests.inputs import leaves, randn
from tests.tolerance import assert_within_error_budget

pytestmark = pytest.mark.gpu

WIDTHS = [4096, 2736, 61]  # hidden widths of ViT-g, ViT-L with SwiGLU; a prime
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def outputs(x: Tensor, gradient: Tensor, backend: str) -> list[Tensor]:
    """Activation; then gradient, activation and sums of the backward in place."""
    dx, activation = x.clone(), gradient.clone()
    sums = swiglu_backward_(activation, dx, backend=backend)
    return [swiglu(x, backend=backend), dx, activation, sums]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pack_is_within_budget(
    width: int, dtype: torch.dtype, kernels: str, device_of_kernels: str, num_images: int
):
    tokens = num_images * (2 * 257 + 8 * 50) or 5
    x = randn(tokens, 2 * width, dtype=dtype, device=device_of_kernels, scale=2.0)
    gradient = randn(tokens, width, dtype=dtype, device=device_of_kernels, seed=1)
    found, low = (outputs(x, gradient, backend) for backend in (kernels, "reference"))
    truth = outputs(x.double(), gradient.double(), "reference")
    names = ("forward", "dx", "activation", "sums")
    for name, out, one, exact in zip(names, found, low, truth, strict=True):
        assert_within_error_budget(out, low_precision=one, truth=exact, name=name)
    assert all(map(torch.equal, found, outputs(x, gradient, kernels)))  # sums have one order


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_autograd_is_within_budget(
    dtype: torch.dtype, kernels: str, device_of_kernels: str
):
    wide = randn(37, 2 * 96 + 8, dtype=dtype, device=device_of_kernels, scale=2.0)
    x = wide[:, 4:-4]  # strided rows
    incoming = randn(37, 96, dtype=dtype, device=device_of_kernels, seed=1)

    def gradient(x: Tensor, backend: str) -> Tensor:
        (leaf,) = leaves(x)
        return torch.autograd.grad(swiglu(leaf, backend=backend), leaf, incoming.to(x.dtype))[0]

    assert_within_error_budget(
        gradient(x, kernels),
        low_precision=gradient(x, "reference"),
        truth=gradient(x.double(), "reference"),
        name="swiglu.dx",
    )
