"""The student/teacher pair: targets and losses of one batch."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from torch import nn

from dinov2_fast.backends import availability
from dinov2_fast.config import LossConfig
from dinov2_fast.train import student_teacher
from dinov2_fast.train.student_teacher import (
    LOSS_NAMES,
    StudentTeacher,
    student_losses,
    teacher_targets,
)
from tests.train.batches import (
    MODEL,
    SEPARATE,
    SHARED,
    build_pair,
    synthetic_batch,
    targets_and_losses,
)

LOSSES = {"shared": SHARED, "separate": SEPARATE}


@pytest.fixture(params=sorted(LOSSES))
def loss(request) -> LossConfig:
    return LOSSES[request.param]


def in_float64(pair: StudentTeacher, batch):
    """The same pair and batch in float64, where comparisons need no tolerance worth naming."""
    floats = ("global_crops", "local_crops", "mask_weights")
    changes = {name: getattr(batch, name).double() for name in floats}
    return pair.double(), dataclasses.replace(batch, **changes)


def count_rows(module: nn.Module) -> list[int]:
    """Rows of every later call of a head, in order."""
    rows: list[int] = []
    module.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    return rows


def published_targets(logits, *, temperature=0.05):
    """Three rounds of Sinkhorn-Knopp on the stored matrix."""
    q = (logits / temperature).exp().T
    for _ in range(3):
        q = q / q.sum(dim=1, keepdim=True)
        q = q / q.sum(dim=0, keepdim=True)
    return q.T


# Targets


def test_teacher_sees_the_global_crops_unmasked():
    pair, batch = build_pair(SEPARATE), synthetic_batch()
    with torch.no_grad():
        pair.teacher.backbone.mask_token.fill_(float("nan"))
    targets = teacher_targets(pair, batch, temperature=0.05)
    assert targets.dino.probabilities().isfinite().all()
    assert targets.ibot.probabilities().isfinite().all()


def test_targets_of_masked_patches_equal_head_on_all_patches_then_selection(loss):
    pair, batch = in_float64(build_pair(loss), synthetic_batch())
    targets = teacher_targets(pair, batch, temperature=0.05)
    features = pair.teacher.backbone.forward_features(batch.global_crops)
    head = pair.teacher["ibot_head" if "ibot_head" in pair.teacher else "dino_head"]
    every_patch = head(features["x_norm_patchtokens"])  # [2B, N, K]
    cls_scores = pair.teacher["dino_head"](features["x_norm_clstoken"])
    torch.testing.assert_close(targets.ibot.logits, every_patch[batch.masks])
    torch.testing.assert_close(targets.dino.logits, cls_scores)


def test_heads_see_cls_and_masked_patches_only():
    # B = 3, L = 3: 6 global and 9 local CLS rows, 7 masked patches; 2 rows of padding never enter.
    batch = synthetic_batch()
    shared, separate = build_pair(SHARED), build_pair(SEPARATE)
    rows = [count_rows(shared.teacher["dino_head"]), count_rows(shared.student["dino_head"])]
    rows += [
        count_rows(network[head])
        for network in (separate.teacher, separate.student)
        for head in ("dino_head", "ibot_head")
    ]
    targets_and_losses(shared, batch)
    targets_and_losses(separate, batch)
    assert rows == [[6 + 7], [15 + 7], [6], [7], [15], [7]]


def test_padding_changes_nothing():
    pair = build_pair(SEPARATE)
    _, padded = targets_and_losses(pair, synthetic_batch(num_padding=9))
    _, exact = targets_and_losses(pair, synthetic_batch(num_padding=0))
    assert all(torch.equal(padded[name], exact[name]) for name in LOSS_NAMES)


def test_temperature_and_centering_reach_the_targets():
    pair, batch = in_float64(build_pair(SHARED), synthetic_batch())
    targets = teacher_targets(pair, batch, temperature=0.06)
    expected = published_targets(targets.dino.logits, temperature=0.06)
    torch.testing.assert_close(targets.dino.probabilities(), expected)


def test_softmax_centres_move_once_per_batch_and_apply_to_the_next_one():
    config = dataclasses.replace(SEPARATE, centering="softmax_centering", center_momentum=0.5)
    pair, batch = build_pair(config), synthetic_batch()
    first = teacher_targets(pair, batch, temperature=0.05)
    assert torch.equal(first.dino.log_u, torch.zeros(24))
    centre = pair.centering["dino"].center
    torch.testing.assert_close(centre, 0.5 * first.dino.logits.mean(dim=0))
    second = teacher_targets(pair, batch, temperature=0.05)
    expected = -0.5 * first.ibot.logits.mean(dim=0) / 0.05
    torch.testing.assert_close(second.ibot.log_u, expected)


# Losses


def test_total_is_the_weighted_sum_and_carries_the_only_graph(loss):
    config = dataclasses.replace(loss, dino_weight=0.7, ibot_weight=1.3, koleo_weight=0.2)
    _, losses = targets_and_losses(build_pair(config), synthetic_batch())
    assert tuple(losses) == LOSS_NAMES
    expected = (
        0.7 * (losses["dino_global"] + losses["dino_local"])
        + 1.3 * losses["ibot"]
        + 0.2 * losses["koleo"]
    )
    assert torch.equal(losses["total"].detach(), expected)
    assert [name for name, value in losses.items() if value.requires_grad] == ["total"]
    assert all(value.shape == () and value.dtype == torch.float32 for value in losses.values())


@pytest.mark.parametrize("num_local", [3, 0])
def test_losses_match_a_float64_textbook_step(loss, num_local):
    """Every crop through the networks on its own, every loss written as in the publications."""
    batch = synthetic_batch(num_local=num_local)
    pair, batch = in_float64(build_pair(loss), batch)
    _, losses = targets_and_losses(pair, batch)

    teacher, student = pair.teacher, pair.student
    patch_head = "ibot_head" if "ibot_head" in student else "dino_head"
    seen = teacher.backbone.forward_features(batch.global_crops)
    cls_targets = published_targets(teacher["dino_head"](seen["x_norm_clstoken"]))
    patch_targets = published_targets(teacher[patch_head](seen["x_norm_patchtokens"][batch.masks]))

    images = [*batch.global_crops.unbind(0), *batch.local_crops.unbind(0)]
    masks = [*batch.masks, *([None] * len(batch.local_crops))]
    features = [
        student.backbone.forward_features(image[None], masks=None if mask is None else mask[None])
        for image, mask in zip(images, masks, strict=True)
    ]
    log_p = [
        torch.log_softmax(student["dino_head"](f["x_norm_clstoken"])[0] / 0.1, dim=0)
        for f in features
    ]
    terms: dict[str, list] = {"dino_global": [], "dino_local": []}
    for index, row in enumerate(log_p):
        crop, image = divmod(index, 3)
        for teacher_crop in (0, 1):
            if teacher_crop != crop:
                pair_loss = -(cls_targets[teacher_crop * 3 + image] * row).sum() / 3
                terms["dino_global" if crop < 2 else "dino_local"].append(pair_loss)
    num_pairs = 2 + 2 * num_local
    ibot, taken = 0.0, 0
    for crop in range(6):
        masked = batch.masks[crop]
        if masked.any():
            tokens = features[crop]["x_norm_patchtokens"][0][masked]
            rows = torch.log_softmax(student[patch_head](tokens) / 0.1, dim=1)
            cut = patch_targets[taken : taken + len(rows)]
            ibot = ibot - (cut * rows).sum(dim=1).mean() / 6
            taken += len(rows)
    koleo = 0.0
    for crop in (0, 1):
        unit = torch.stack(
            [nn.functional.normalize(f["x_norm_clstoken"][0], dim=0) for f in features]
        )[3 * crop : 3 * crop + 3]
        distances = torch.cdist(unit, unit) + 10 * torch.eye(3)
        koleo = koleo - distances.amin(dim=1).log().mean()
    expected = {
        "dino_global": sum(terms["dino_global"]) / num_pairs,
        "dino_local": torch.as_tensor(sum(terms["dino_local"]), dtype=torch.float64) / num_pairs,
        "ibot": ibot,
        "koleo": koleo,
    }
    expected["total"] = expected["dino_global"] + expected["dino_local"] + ibot + 0.1 * koleo
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].detach().double(), value.detach(), msg=name)


@pytest.mark.parametrize(
    ("recipe", "crops", "num_terms"),
    [
        ("official", "recipe", 2),
        ("paper", "recipe", 1),
        ("paper", "both", 2),
        ("official", "first", 1),
    ],
)
def test_koleo_follows_the_recipe_unless_told_otherwise(recipe, crops, num_terms):
    # Both global crops hold the same images, so the sum over both is twice one.
    batch = synthetic_batch(masked_counts=(0,) * 6)
    batch.global_crops[3:] = batch.global_crops[:3]
    config = dataclasses.replace(SHARED, koleo_crops=crops)
    _, losses = targets_and_losses(build_pair(config, recipe=recipe), batch)
    first = dataclasses.replace(SHARED, koleo_crops="first")
    _, one = targets_and_losses(build_pair(first), batch)
    assert one["koleo"].abs() > 0
    assert torch.equal(losses["koleo"], num_terms * one["koleo"])


@pytest.mark.parametrize(
    ("changes", "zeros", "missing"),
    [
        ({"dino_weight": 0.0}, {"dino_global", "dino_local"}, {"dino_head"}),
        ({"ibot_weight": 0.0}, {"ibot"}, {"ibot_head"}),
        ({"koleo_weight": 0.0}, {"koleo"}, set()),
    ],
)
def test_a_term_without_weight_is_zero_and_has_no_head(changes, zeros, missing):
    pair = build_pair(dataclasses.replace(SEPARATE, **changes))
    _, losses = targets_and_losses(pair, synthetic_batch())
    losses["total"].backward()
    assert {name for name, value in losses.items() if value == 0} == zeros
    assert {"dino_head", "ibot_head"} - set(pair.student) == missing
    assert all(p.grad is not None for p in pair.student.parameters())


def test_a_shared_head_without_patch_term_sees_no_patch():
    pair = build_pair(dataclasses.replace(SHARED, ibot_weight=0.0))
    rows = [count_rows(pair.teacher["dino_head"]), count_rows(pair.student["dino_head"])]
    targets_and_losses(pair, synthetic_batch())
    assert rows == [[6], [15]]


def test_a_batch_without_masked_patches_has_no_patch_loss(loss):
    pair = build_pair(loss)
    _, losses = targets_and_losses(pair, synthetic_batch(masked_counts=(0,) * 6))
    losses["total"].backward()
    assert losses["ibot"] == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pair.student.parameters())


def test_dropped_branches_are_a_function_of_the_generator():
    pair = build_pair(model=dataclasses.replace(MODEL, drop_ratio=0.4))
    batch = synthetic_batch()
    targets = teacher_targets(pair, batch, temperature=0.05)

    def total(seed: int):
        generator = torch.Generator().manual_seed(seed)
        return student_losses(pair, batch, targets, generator=generator)["total"].detach()

    assert torch.equal(total(1), total(1))
    assert not torch.equal(total(1), total(2))


def test_bf16_runs_under_autocast_and_returns_fp32_losses_near_those_of_fp32():
    batch = synthetic_batch()
    targets, losses = targets_and_losses(build_pair(SEPARATE, precision="bf16"), batch)
    _, exact = targets_and_losses(build_pair(SEPARATE), batch)
    losses["total"].backward()
    assert targets.dino.logits.dtype == torch.bfloat16
    assert targets.dino.log_u.dtype == torch.float32
    for name in LOSS_NAMES:
        assert losses[name].dtype == torch.float32
        # Scores of at most 1, rounded to 8 bits, over the smallest temperature of 0.05.
        assert (losses[name] - exact[name]).detach().abs() <= 2**-8 / 0.05, name


def test_losses_are_fp32_even_inside_a_callers_autocast():
    pair, batch = build_pair(SEPARATE), synthetic_batch()
    _, plain = targets_and_losses(pair, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, inside = targets_and_losses(pair, batch)
    assert all(torch.equal(plain[name], inside[name]) for name in LOSS_NAMES)


@pytest.mark.parametrize("num_local", [3, 0])
def test_scores_made_inside_the_loss_give_the_losses_and_gradients_of_stored_ones(loss, num_local):
    reason = availability("cross_entropy", "cpu")["native"]
    if reason:
        pytest.skip(reason)
    batch, found = synthetic_batch(num_local=num_local), []
    for fused in (False, True):
        pair = build_pair(loss)
        targets = teacher_targets(pair, batch, temperature=0.05)
        with mock.patch.object(student_teacher, "_fuses_losses", return_value=fused):
            losses = student_losses(pair, batch, targets)
        losses["total"].backward()
        gradients = {name: p.grad for name, p in pair.student.named_parameters()}
        found.append(({name: value.detach() for name, value in losses.items()}, gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiling", [True, False])
def test_scores_are_stored_in_compiled_code_alone(compiling):
    reason = availability("cross_entropy", "cpu")["native"]
    if reason:
        pytest.skip(reason)
    pair, batch = build_pair(SHARED), synthetic_batch()
    scored = []
    scores = type(pair.student).scores

    def spy(self, *arguments, scored: bool = True, seen=scored):
        seen.append(scored)
        return scores(self, *arguments, scored=scored)

    targets = teacher_targets(pair, batch, temperature=0.05)
    with (
        mock.patch.object(type(pair.student), "scores", spy),
        mock.patch.object(torch.compiler, "is_compiling", return_value=compiling),
    ):
        student_losses(pair, batch, targets)
    assert scored == [compiling]
