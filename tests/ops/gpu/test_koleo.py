"""KoLeo's kernels for a GPU, on batches of class tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_fast.ops.koleo import koleo
from tests.inputs import leaves, randn
from tests.tolerance import assert_within_error_budget

pytestmark = pytest.mark.gpu

# Global crops of a batch per GPU, and the widths of ViT-S, B and L; a prime of each. The two
# nearest rows of any row are apart by more than 1e-5, so that rounding exchanges none.
SHAPES = [(64, 384), (128, 768), (256, 1024), (131, 61)]


def loss_and_gradient(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    (leaf,) = leaves(x)
    loss = koleo(leaf, backend=backend)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_are_within_budget(kernels: str, device_of_kernels: str, shape):
    if device_of_kernels == "cpu":  # an interpreter is slow
        shape = (shape[0] // 8, shape[1])
    wide = randn(shape[0], shape[1] + 8, device=device_of_kernels)
    x = wide[:, 4:-4]  # strided rows
    found, low = (loss_and_gradient(x, backend) for backend in (kernels, "reference"))
    truth = loss_and_gradient(x.double(), "reference")
    for name, *candidates in zip(("loss", "dx"), found, low, truth, strict=True):
        out, one, exact = candidates
        assert_within_error_budget(out, low_precision=one, truth=exact, name=name)
    again = loss_and_gradient(x, kernels)
    assert all(map(torch.equal, found, again))  # sums have one order
