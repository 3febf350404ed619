"""Image-level loss against hand-computed values and a float64 loop over all pairs."""

from __future__ import annotations

import math

import pytest
import torch

from dinov2_fast.losses.dino import dino_loss, dino_prototype_loss
from dinov2_fast.losses.targets import SinkhornCentering, SoftTargets

SHAPES = [
    (3, 8, 64),  # the production number of local crops
    (2, 0, 17),  # no local crops; a prime number of prototypes
    (1, 1, 5),  # one image
    (5, 3, 31),  # odd batch, so that halves do not end on round rows
]


def targets_of(probabilities: torch.Tensor, *, temperature: float = 0.05) -> SoftTargets:
    """Targets that are these [R, K] probabilities up to rounding."""
    rows, prototypes = probabilities.shape
    zeros = probabilities.new_zeros
    return SoftTargets(
        probabilities.log() * temperature, zeros(prototypes), zeros(rows), temperature
    )


def textbook(student_global, student_local, teacher, temperature):
    """Sum over pairs of different crops of batch means over the number of pairs, in float64."""
    batch_size = len(teacher) // 2
    teacher_crops = teacher.split(batch_size)
    global_sum = local_sum = torch.zeros((), dtype=torch.float64)
    num_pairs = 0
    student_crops = [*student_global.split(batch_size)]
    if len(student_local):
        student_crops += student_local.split(batch_size)
    for s, student in enumerate(student_crops):
        log_p = torch.log_softmax(student / temperature, dim=1)
        for t, target in enumerate(teacher_crops):
            if s == t:
                continue
            num_pairs += 1
            pair = -(target * log_p).sum(dim=1).mean()
            if s < 2:
                global_sum = global_sum + pair
            else:
                local_sum = local_sum + pair
    return global_sum / num_pairs, local_sum / num_pairs, num_pairs


def example(batch_size, num_local, num_prototypes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = (2 * batch_size, 2 * batch_size, num_local * batch_size)
    teacher, student_global, student_local = (
        torch.randn(n, num_prototypes, generator=generator, dtype=torch.float64) for n in rows
    )
    return teacher.softmax(dim=1), student_global, student_local


def test_known_values():
    # One image, K = 2. Targets: crop A is surely prototype 0, crop B surely prototype 1.
    # Student crop A is sure of prototype 1, which is right for the pair (A, B): about 0 loss.
    # Student crop B is undecided: log 2. The local crop is undecided too: log 2 twice.
    tiny = 1e-12
    targets = targets_of(torch.tensor([[1 - tiny, tiny], [tiny, 1 - tiny]]))
    student_global = torch.tensor([[-40.0, 40.0], [0.0, 0.0]])
    student_local = torch.zeros(1, 2)
    global_loss, local_loss = dino_loss(
        student_global, student_local, targets, student_temperature=1.0
    )
    # 4 pairs: two with a global student crop, two with the local one, each of weight 1/4.
    assert math.isclose(float(global_loss), math.log(2) / 4, rel_tol=1e-6)
    assert math.isclose(float(local_loss), 2 * math.log(2) / 4, rel_tol=1e-6)


def test_a_crop_is_never_compared_with_itself():
    # Each teacher crop is sure of a prototype of its own; the student copies the *other* crop.
    identity = torch.eye(4)
    targets = targets_of(identity.clamp(min=1e-12))  # two images, crops A: rows 0-1, B: rows 2-3
    swapped = identity.roll(2, dims=0) * 60
    copied = identity * 60
    no_local = torch.zeros(0, 4)
    right, _ = dino_loss(swapped, no_local, targets, student_temperature=1.0)
    wrong, _ = dino_loss(copied, no_local, targets, student_temperature=1.0)
    assert float(right) < 1e-6
    assert math.isclose(float(wrong), 60, rel_tol=1e-6)


@pytest.mark.parametrize(("batch_size", "num_local", "num_prototypes"), SHAPES)
def test_matches_a_float64_loop_over_all_pairs(batch_size, num_local, num_prototypes):
    teacher, *student = example(batch_size, num_local, num_prototypes)
    student = [crops.requires_grad_() for crops in student]
    found = dino_loss(*student, targets_of(teacher), student_temperature=0.1)
    *truth, num_pairs = textbook(*student, teacher, 0.1)
    gradients, truth_gradients = (
        torch.autograd.grad(sum(parts), student, allow_unused=True, materialize_grads=True)
        for parts in (found, truth)
    )
    assert num_pairs == 2 + 2 * num_local
    torch.testing.assert_close(found, tuple(truth))
    torch.testing.assert_close(gradients, truth_gradients)


@pytest.mark.parametrize(("batch_size", "num_local", "num_prototypes"), SHAPES)
def test_of_features_and_prototypes_equals_that_of_their_scores(
    batch_size, num_local, num_prototypes
):
    teacher, _, _ = example(batch_size, num_local, num_prototypes)
    targets, generator = targets_of(teacher), torch.Generator().manual_seed(1)
    num_global = 2 * batch_size
    features, weight = (
        torch.randn(n, 4, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (num_global + num_local * batch_size, num_prototypes)
    )
    options = {"student_temperature": 0.1}
    found = dino_prototype_loss(features, weight, targets, num_global=num_global, **options)
    scores = features @ weight.T
    parts = dino_loss(scores[:num_global], scores[num_global:], targets, **options)
    torch.testing.assert_close(found, (sum(parts), *parts))
    assert [part.requires_grad for part in found] == [True, False, False]
    assert torch.equal(found[0].detach(), found[1] + found[2])
    gradients = torch.autograd.grad(found[0], (features, weight))
    torch.testing.assert_close(gradients, torch.autograd.grad(sum(parts), (features, weight)))
    with pytest.raises(ValueError, match="dino: expected 2 teacher rows per image"):
        dino_prototype_loss(features, weight, targets, num_global=num_global - 1, **options)


def test_low_precision_scores_give_an_fp32_loss():
    teacher, *student = example(2, 3, 17)
    targets = targets_of(teacher.float())
    low = [crops.to(torch.bfloat16) for crops in student]
    found = dino_loss(*low, targets, student_temperature=0.1)
    # The scores are rounded before the call; the arithmetic after it is fp32.
    expected = dino_loss(*(crops.float() for crops in low), targets, student_temperature=0.1)
    assert [part.dtype for part in found] == [torch.float32, torch.float32]
    torch.testing.assert_close(found, expected)


def test_eighteen_pairs_weigh_the_same():
    # Equal students and uniform targets: every pair has the same loss, log K.
    targets = targets_of(torch.full((4, 16), 1 / 16))
    global_loss, local_loss = dino_loss(
        torch.zeros(4, 16), torch.zeros(16, 16), targets, student_temperature=0.1
    )
    assert math.isclose(float(global_loss), 2 / 18 * math.log(16), rel_tol=1e-6)
    assert math.isclose(float(local_loss), 16 / 18 * math.log(16), rel_tol=1e-6)


def test_only_the_student_receives_gradients():
    teacher_logits = torch.randn(4, 8).requires_grad_()
    targets = SinkhornCentering(num_iterations=3)(teacher_logits, temperature=0.05)
    student = torch.randn(4, 8).requires_grad_()
    sum(dino_loss(student, torch.zeros(0, 8), targets, student_temperature=0.1)).backward()
    assert teacher_logits.grad is None
    assert student.grad is not None
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("global_rows", "local_rows", "teacher_rows", "words"),
    [
        (4, 8, 3, "2 teacher rows per image"),
        (2, 8, 4, "as many global student rows, got 4 and 2"),
        (4, 3, 4, "multiple of the 2 images"),
        (0, 0, 0, "multiple of the 0 images"),
    ],
)
def test_rejects_rows_that_do_not_fit_together(global_rows, local_rows, teacher_rows, words):
    targets = targets_of(torch.full((teacher_rows, 4), 0.25))
    with pytest.raises(ValueError, match=words):
        dino_loss(
            torch.zeros(global_rows, 4),
            torch.zeros(local_rows, 4),
            targets,
            student_temperature=0.1,
        )
