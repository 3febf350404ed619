"""KoLeo term per crop, against hand-computed values and a float64 loop."""

from __future__ import annotations

import math

import pytest
import torch

from dinov2_fast.losses.koleo import koleo_loss


def textbook(features: torch.Tensor) -> torch.Tensor:
    """-mean(log(distance to the nearest other row)) of one crop's [B, C] features in float64."""
    unit = features / features.norm(dim=1, keepdim=True)
    terms = []
    for i in range(len(unit)):
        distances = [(unit[i] - unit[j]).norm() for j in range(len(unit)) if j != i]
        terms.append(-torch.log(torch.stack(distances).min()))
    return torch.stack(terms).mean()


def test_known_values():
    # First crops at right angles: distance sqrt 2. Second crops opposite: distance 2.
    cls = torch.tensor([[3.0, 0.0], [0.0, 0.5], [1.0, 0.0], [-2.0, 0.0]])
    first = float(koleo_loss(cls, crops="first"))
    both = float(koleo_loss(cls, crops="both"))
    assert math.isclose(first, -math.log(math.sqrt(2)), rel_tol=1e-6)
    assert math.isclose(both, -math.log(math.sqrt(2)) - math.log(2), rel_tol=1e-6)


@pytest.mark.parametrize("crops", ["both", "first"])
@pytest.mark.parametrize("batch_size", [2, 5, 33])
def test_matches_a_float64_loop_and_sums_over_crops(batch_size, crops):
    generator = torch.Generator().manual_seed(batch_size)
    cls = torch.randn(2 * batch_size, 16, generator=generator, dtype=torch.float64)
    cls.requires_grad_()
    found = koleo_loss(cls, crops=crops)
    truth = textbook(cls[:batch_size])
    if crops == "both":
        truth = truth + textbook(cls[batch_size:])
    torch.testing.assert_close(found, truth)
    torch.testing.assert_close(torch.autograd.grad(found, cls), torch.autograd.grad(truth, cls))


def test_images_of_different_crops_are_not_neighbours():
    # Both crops of an image are equal; were they compared, the distance would be 0.
    first = torch.eye(3)
    found = float(koleo_loss(torch.cat((first, first)), crops="both"))
    assert math.isclose(found, -2 * math.log(math.sqrt(2)), rel_tol=1e-6)


@pytest.mark.parametrize("crops", ["both", "first"])
def test_one_image_has_no_neighbour_and_no_term(crops):
    cls = torch.randn(2, 8, requires_grad=True)
    found = koleo_loss(cls, crops=crops)
    found.backward()
    assert float(found.detach()) == 0
    assert cls.grad is not None
    assert not cls.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_features_are_compared_in_fp32(dtype):
    # Duplicates: in fp16 the 1e-8 inside the logarithm would be 0 and the term infinite.
    cls = torch.randn(4, 8).repeat_interleave(2, dim=0).to(dtype).requires_grad_()
    found = koleo_loss(cls, crops="both")
    found.backward()
    assert found.dtype == torch.float32
    assert math.isfinite(float(found.detach()))
    assert cls.grad is not None
    assert cls.grad.isfinite().all()
