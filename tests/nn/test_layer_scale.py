"""LayerScale multiplies channels by a learnt vector."""

from __future__ import annotations

import torch

from dinov2_fast.nn import LayerScale
from tests.inputs import randn


def test_scales_channels():
    scale = LayerScale(2, 0.5)
    with torch.no_grad():
        scale.gamma[1] = 3

    assert scale(torch.ones(2, 2)).tolist() == [[0.5, 3], [0.5, 3]]


def test_starts_at_the_value_of_dinov2_training():
    assert LayerScale(4).state_dict()["gamma"].tolist() == [torch.tensor(1e-5).item()] * 4


def test_gradient_of_gamma_sums_over_tokens():
    scale, x = LayerScale(3), randn(7, 3)

    scale(x).sum().backward()

    assert torch.equal(scale.gamma.grad, x.sum(0))
