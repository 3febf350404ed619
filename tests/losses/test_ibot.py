"""Patch-level loss against hand-computed values and a float64 loop over images."""

from __future__ import annotations

import math

import pytest
import torch

from dinov2_fast.losses.ibot import ibot_loss, ibot_prototype_loss
from dinov2_fast.losses.targets import SoftTargets


def targets_of(probabilities: torch.Tensor, *, temperature: float = 0.07) -> SoftTargets:
    """Targets that are these [M, K] probabilities up to rounding."""
    rows, prototypes = probabilities.shape
    zeros = probabilities.new_zeros
    return SoftTargets(
        probabilities.log() * temperature, zeros(prototypes), zeros(rows), temperature
    )


def test_known_values():
    # Crop 0 has one masked patch, crop 1 has two, crops 2 and 3 none. Undecided student: log K.
    weights = torch.tensor([1.0, 0.5, 0.5])
    targets = targets_of(torch.full((3, 8), 1 / 8))
    found = ibot_loss(torch.zeros(3, 8), targets, weights, num_crops=4, student_temperature=0.1)
    # Two masked crops of loss log 8 each, divided by all four crops.
    assert math.isclose(float(found), 2 * math.log(8) / 4, rel_tol=1e-6)


@pytest.mark.parametrize(
    "masked_counts",
    [
        (3, 0, 7, 1, 0, 0),  # half of the crops masked, one of them in a single patch
        (5,),  # one crop
        (0, 0, 0, 11),  # all masked patches in the last crop
    ],
)
def test_matches_a_float64_loop_over_images(masked_counts):
    num_masked, num_crops, num_prototypes = sum(masked_counts), len(masked_counts), 23
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(
        2, num_masked, num_prototypes, generator=generator, dtype=torch.float64
    )
    student.requires_grad_()
    teacher = teacher.softmax(dim=1)
    weights = torch.cat([torch.full((n,), 1 / n, dtype=torch.float64) for n in masked_counts if n])
    found = ibot_loss(
        student, targets_of(teacher), weights, num_crops=num_crops, student_temperature=0.1
    )
    truth = torch.zeros((), dtype=torch.float64)
    begin = 0
    for count in masked_counts:
        for row in range(begin, begin + count):
            log_p = torch.log_softmax(student[row] / 0.1, dim=0)
            truth = truth - (teacher[row] * log_p).sum() / count
        begin += count
    truth = truth / num_crops
    torch.testing.assert_close(found, truth)
    torch.testing.assert_close(
        torch.autograd.grad(found, student), torch.autograd.grad(truth, student)
    )


def test_without_masked_patches_the_loss_is_zero_and_keeps_its_graph():
    student = torch.zeros(0, 8, requires_grad=True)
    targets = targets_of(torch.zeros(0, 8))
    found = ibot_loss(student, targets, torch.zeros(0), num_crops=4, student_temperature=0.1)
    found.backward()
    assert float(found.detach()) == 0
    assert student.grad is not None
    assert student.grad.shape == (0, 8)


@pytest.mark.parametrize(("target_rows", "num_weights"), [(2, 3), (3, 4)])
def test_rejects_rows_that_do_not_fit_together(target_rows, num_weights):
    with pytest.raises(ValueError, match="expected 3 target rows and weights"):
        ibot_loss(
            torch.zeros(3, 4),
            targets_of(torch.full((target_rows, 4), 0.25)),
            torch.ones(num_weights),
            num_crops=2,
            student_temperature=0.1,
        )


@pytest.mark.parametrize("num_masked", [7, 0])
def test_of_features_and_prototypes_equals_that_of_their_scores(num_masked):
    generator = torch.Generator().manual_seed(2)
    features, weight, teacher = (
        torch.randn(n, m, generator=generator, dtype=torch.float64).requires_grad_()
        for n, m in ((num_masked, 5), (11, 5), (num_masked, 11))
    )
    targets = targets_of(teacher.detach().softmax(dim=1))
    mask_weights = torch.rand(num_masked, generator=generator).double()
    options = {"num_crops": 4, "student_temperature": 0.1}
    found = ibot_prototype_loss(features, weight, targets, mask_weights, **options)
    expected = ibot_loss(features @ weight.T, targets, mask_weights, **options)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(loss, (features, weight)) for loss in (found, expected))
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match="ibot: expected"):
        ibot_prototype_loss(features, weight, targets, torch.zeros(3), **options)
