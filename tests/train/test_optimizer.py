"""Parameter groups spelled out, AdamW + clip + EMA against torch's own, freezing and skipping."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from dinov2_fast.config import CropConfig, ModelConfig, OptimizerConfig, load_config
from dinov2_fast.errors import CheckpointError
from dinov2_fast.train import optimizer as optimizer_module
from dinov2_fast.train.optimizer import (
    ParameterGroup,
    build_optimizer,
    parameter_groups,
)
from dinov2_fast.train.schedules import StepValues
from dinov2_fast.train.student_teacher import build_student_teacher
from tests.train.batches import SEPARATE, build_pair

CONFIG = OptimizerConfig(layer_decay=0.8, patch_embed_lr_multiplier=0.5, clip_norm=2.0)
VALUES = StepValues(
    lr=1e-2,
    weight_decay=0.3,
    momentum=0.9,
    teacher_temperature=0.05,
    last_layer_lr_factor=1.0,
)


def group_of(groups: list[ParameterGroup], name: str) -> ParameterGroup:
    (found,) = [group for group in groups if name in group.names]
    return found


def give_gradients(pair, *, scales: dict[str, float], seed: int = 0) -> None:
    """Random gradients whose norm over each sub-network is the given one."""
    generator = torch.Generator().manual_seed(seed)
    for name, network in pair.student.items():
        parameters = list(network.parameters())
        raw = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        norm = math.sqrt(sum(float(g.square().sum()) for g in raw))
        for parameter, gradient in zip(parameters, raw, strict=True):
            parameter.grad = gradient * (scales[name] / norm)


def snapshot(pair, optimizer) -> dict[str, torch.Tensor]:
    """Bits of every tensor that a step may write."""
    moments = {f"m.{name}": v for name, v in optimizer.state_dict().items() if "exp_avg" in name}
    state = {**pair.state_dict(), **moments}
    return {
        name: value.detach().clone().view(torch.int32 if value.dtype == torch.float32 else None)
        for name, value in state.items()
    }


def assert_same_bits(before, after) -> None:
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


# Groups


def test_groups_of_vit_l_are_those_of_the_official_recipe():
    pair = build_student_teacher(
        ModelConfig(arch="vitl14_reg4"),
        dataclasses.replace(SEPARATE),
        CropConfig(),
        recipe="official",
        seed=0,
        device="meta",
    )
    groups = parameter_groups(pair.student, OptimizerConfig(), depth=24)
    expected = {
        # name: (learning-rate multiplier, decays, prototypes)
        "backbone.patch_embed.proj.weight": (0.9**25 * 0.2, True, False),
        "backbone.patch_embed.proj.bias": (0.9**25 * 0.2, False, False),
        "backbone.pos_embed": (0.9**25, True, False),
        "backbone.cls_token": (0.9**25, True, False),
        "backbone.mask_token": (0.9**25, True, False),
        "backbone.register_tokens": (0.9**25, True, False),
        "backbone.blocks.0.attn.qkv.weight": (0.9**24, True, False),
        "backbone.blocks.0.attn.qkv.bias": (0.9**24, False, False),
        "backbone.blocks.0.norm1.weight": (0.9**24, False, False),
        "backbone.blocks.0.ls1.gamma": (0.9**24, False, False),
        "backbone.blocks.10.mlp.fc1.weight": (0.9**14, True, False),
        "backbone.blocks.23.mlp.fc2.bias": (0.9, False, False),
        "backbone.norm.weight": (1.0, False, False),
        "backbone.norm.bias": (1.0, False, False),
        "dino_head.mlp.0.weight": (1.0, True, False),
        "dino_head.mlp.4.bias": (1.0, False, False),
        "dino_head.last_layer.weight_g": (1.0, True, True),
        "ibot_head.last_layer.weight_v": (1.0, True, True),
    }
    for name, (multiplier, decays, is_last_layer) in expected.items():
        group = group_of(groups, name)
        assert math.isclose(group.lr_multiplier, multiplier, rel_tol=1e-12), name
        assert (group.decays, group.is_last_layer) == (decays, is_last_layer), name
        assert group.sub_network == name.split(".")[0]
    assert round(group_of(groups, "backbone.patch_embed.proj.weight").lr_multiplier, 5) == 0.01436
    listed = [name for group in groups for name in group.names]
    assert sorted(listed) == sorted(name for name, _ in pair.student.named_parameters())
    # 25 heights of decaying and undecayed parameters, the tokens' one without the latter, the
    # patch embedding's two; heads: decaying, undecayed, prototypes. Top height: the norm alone.
    assert len(groups) == (24 * 2 + 1 + 1) + 2 + 2 * 3


def test_without_layer_decay_only_the_patch_embedding_differs():
    config = load_config("vitl14")
    pair = build_pair(SEPARATE)
    groups = parameter_groups(pair.student, config.optimizer, depth=2)
    assert {group.lr_multiplier for group in groups} == {1.0, 0.2}
    slow = [name for group in groups if group.lr_multiplier == 0.2 for name in group.names]
    assert sorted(slow) == ["backbone.patch_embed.proj.bias", "backbone.patch_embed.proj.weight"]


# Steps


def test_three_steps_match_torch_adamw_with_a_clip_per_sub_network_and_a_moving_average():
    pair = build_pair(SEPARATE).double()
    truth = copy.deepcopy(pair)
    groups = parameter_groups(truth.student, CONFIG, depth=2)
    named = dict(truth.student.named_parameters())
    torch_optimizer = torch.optim.AdamW(
        [
            {
                "params": [named[name] for name in group.names],
                "lr": VALUES.lr * group.lr_multiplier,
                "weight_decay": VALUES.weight_decay if group.decays else 0.0,
            }
            for group in groups
        ],
        betas=(CONFIG.beta1, CONFIG.beta2),
        eps=CONFIG.eps,
    )
    optimizer = build_optimizer(pair, CONFIG, global_batch_size=8)
    # Above, below and just below the norm of 2 that is allowed.
    scales = {"backbone": 100.0, "dino_head": 0.5, "ibot_head": 1.999}
    for seed in range(3):
        for networks in (pair, truth):
            give_gradients(networks, scales=scales, seed=seed)
        found = optimizer.step(VALUES)
        for network in truth.student.values():
            torch.nn.utils.clip_grad_norm_(network.parameters(), CONFIG.clip_norm)
        torch_optimizer.step()
        with torch.no_grad():
            for ours, student in zip(
                truth.teacher.parameters(), truth.student.parameters(), strict=True
            ):
                ours.mul_(VALUES.momentum).add_(student, alpha=1 - VALUES.momentum)
        for name, norm in scales.items():
            assert math.isclose(float(found[f"gradient_norm_{name}"]), norm, rel_tol=1e-6)
        assert not found["skipped"]
    expected = truth.state_dict()
    for name, value in pair.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_clipping_acts_on_each_sub_network_by_itself():
    def moments(scale_of_backbone: float):
        pair = build_pair(SEPARATE)
        optimizer = build_optimizer(pair, CONFIG, global_batch_size=8)
        give_gradients(
            pair, scales={"backbone": scale_of_backbone, "dino_head": 1.0, "ibot_head": 1.0}
        )
        optimizer.step(VALUES)
        return optimizer.state_dict()

    small, large = moments(2.0), moments(2000.0)
    for name in small:
        if "dino_head" in name or "ibot_head" in name:
            assert torch.equal(small[name], large[name]), name
    backbone = [v for n, v in large.items() if n.startswith("exp_avg.backbone")]
    norm = math.sqrt(sum(float(v.square().sum()) for v in backbone))
    assert math.isclose(norm, (1 - CONFIG.beta1) * CONFIG.clip_norm, rel_tol=1e-4)


def test_clip_norm_zero_turns_clipping_off():
    pair = build_pair(SEPARATE)
    config = dataclasses.replace(CONFIG, clip_norm=0.0)
    optimizer = build_optimizer(pair, config, global_batch_size=8)
    give_gradients(pair, scales={"backbone": 50.0, "dino_head": 50.0, "ibot_head": 50.0})
    gradient = pair.student.backbone.pos_embed.grad
    optimizer.step(VALUES)
    found = optimizer.state_dict()["exp_avg.backbone.pos_embed"]
    torch.testing.assert_close(found, gradient * (1 - config.beta1))


def test_frozen_prototypes_do_not_move_but_their_moments_do():
    pair = build_pair(SEPARATE)
    optimizer = build_optimizer(pair, CONFIG, global_batch_size=8)
    before = {name: value.clone() for name, value in pair.student.state_dict().items()}
    give_gradients(pair, scales={"backbone": 1.0, "dino_head": 1.0, "ibot_head": 1.0})
    optimizer.step(dataclasses.replace(VALUES, last_layer_lr_factor=0.0))
    same = {name for name, v in pair.student.state_dict().items() if torch.equal(v, before[name])}
    assert same == {
        f"{head}.last_layer.{part}"
        for head in ("dino_head", "ibot_head")
        for part in ("weight_g", "weight_v")
    }
    moments = optimizer.state_dict()
    assert all(
        moments[f"{kind}.{name}"].any() for name in same for kind in ("exp_avg", "exp_avg_sq")
    )


def test_momentum_one_keeps_the_teacher_and_zero_copies_the_student():
    for momentum in (0.0, 1.0):
        pair = build_pair(SEPARATE)
        optimizer = build_optimizer(pair, CONFIG, global_batch_size=8)
        teacher = {name: value.clone() for name, value in pair.teacher.state_dict().items()}
        give_gradients(pair, scales={"backbone": 1.0, "dino_head": 1.0, "ibot_head": 1.0})
        optimizer.step(dataclasses.replace(VALUES, momentum=momentum))
        expected = teacher if momentum == 1 else pair.student.state_dict()
        assert all(torch.equal(v, expected[name]) for name, v in pair.teacher.state_dict().items())


def test_parameters_without_a_gradient_stay_as_they_are():
    pair = build_pair(SEPARATE)
    optimizer = build_optimizer(pair, CONFIG, global_batch_size=8)
    give_gradients(pair, scales={"backbone": 1.0, "dino_head": 1.0, "ibot_head": 1.0})
    pair.student.backbone.mask_token.grad = None
    before = pair.student.backbone.mask_token.clone()
    optimizer.step(VALUES)
    assert torch.equal(pair.student.backbone.mask_token, before)
    assert not optimizer.state_dict()["exp_avg.backbone.mask_token"].any()


def test_zero_gradients_drops_them_and_a_step_without_any_is_refused():
    pair = build_pair(SEPARATE)
    optimizer = build_optimizer(pair, CONFIG, global_batch_size=8)
    give_gradients(pair, scales={"backbone": 1.0, "dino_head": 1.0, "ibot_head": 1.0})
    optimizer.zero_gradients()
    assert all(parameter.grad is None for parameter in pair.student.parameters())
    with pytest.raises(ValueError, match="expected gradients, got none"):
        optimizer.step(VALUES)


# Skipping


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("where", ["backbone", "dino_head", "ibot_head"])
def test_a_gradient_that_is_not_finite_changes_no_bit(where, value):
    # 1e30 is finite itself; its square is not, and neither is the norm that would clip it.
    pair = build_pair(SEPARATE)
    optimizer = build_optimizer(pair, CONFIG, global_batch_size=8)
    scales = {"backbone": 1.0, "dino_head": 1.0, "ibot_head": 1.0}
    give_gradients(pair, scales=scales)
    optimizer.step(VALUES)
    with torch.no_grad():
        pair.student.backbone.mask_token[0, 0] = -0.0  # adding 0 would turn its sign
    before = snapshot(pair, optimizer)
    give_gradients(pair, scales=scales, seed=1)
    next(pair.student[where].parameters()).grad.view(-1)[0] = value
    found = optimizer.step(VALUES)
    assert found["skipped"]
    assert found["skipped"].dtype == torch.bool
    assert not found[f"gradient_norm_{where}"].isfinite()
    assert_same_bits(before, snapshot(pair, optimizer))


@pytest.mark.parametrize("skip", [True, False])
def test_the_caller_can_skip_a_step(skip):
    pair = build_pair(SEPARATE)
    optimizer = build_optimizer(pair, CONFIG, global_batch_size=8)
    before = snapshot(pair, optimizer)
    give_gradients(pair, scales={"backbone": 1.0, "dino_head": 1.0, "ibot_head": 1.0})
    found = optimizer.step(VALUES, skip=torch.tensor(skip))
    after = snapshot(pair, optimizer)
    assert bool(found["skipped"]) == skip
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert (changed == []) == skip


def test_one_process_that_skips_makes_all_of_them_skip(monkeypatch):
    monkeypatch.setattr(optimizer_module, "all_reduce_max", lambda flag: flag.fill_(1.0))
    pair = build_pair(SEPARATE)
    optimizer = build_optimizer(pair, CONFIG, global_batch_size=8)
    before = snapshot(pair, optimizer)
    give_gradients(pair, scales={"backbone": 1.0, "dino_head": 1.0, "ibot_head": 1.0})
    assert optimizer.step(VALUES)["skipped"]
    assert_same_bits(before, snapshot(pair, optimizer))


# State


def test_a_loaded_state_continues_bit_for_bit():
    scales = {"backbone": 1.0, "dino_head": 1.0, "ibot_head": 1.0}
    pair = build_pair(SEPARATE)
    optimizer = build_optimizer(pair, CONFIG, global_batch_size=8)
    give_gradients(pair, scales=scales)
    optimizer.step(VALUES)
    weights = copy.deepcopy(pair.state_dict())
    state = {name: value.clone() for name, value in optimizer.state_dict().items()}
    other = build_pair(SEPARATE, seed=5)
    other.load_state_dict(weights)
    resumed = build_optimizer(other, CONFIG, global_batch_size=8)
    resumed.load_state_dict(state)
    for networks, steps in ((pair, optimizer), (other, resumed)):
        give_gradients(networks, scales=scales, seed=1)
        steps.step(VALUES)
    assert_same_bits(snapshot(pair, optimizer), snapshot(other, resumed))
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert not any(value.requires_grad for value in state.values())


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_a_state_of_other_networks_is_refused_and_nothing_is_copied(damage):
    pair = build_pair(SEPARATE)
    optimizer = build_optimizer(pair, CONFIG, global_batch_size=8)
    state = {name: torch.ones_like(value) for name, value in optimizer.state_dict().items()}
    name = "exp_avg.backbone.blocks.1.norm2.weight"
    if damage == "missing":
        del state[name]
    elif damage == "unknown":
        name = "exp_avg.backbone.blocks.2.norm2.weight"
        state[name] = torch.ones(64)
    else:
        state[name] = torch.ones(65)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        optimizer.load_state_dict(state)
    assert not any(value.any() for value in optimizer.state_dict().values())
