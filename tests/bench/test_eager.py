"""The eager reference: the fast step's mathematics, written another way."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinov2_fast.bench.arithmetic import eager_flops, fast_flops
from dinov2_fast.bench.contender import FastStep, build
from dinov2_fast.bench.eager.step import EagerStep
from dinov2_fast.bench.eager.vision_transformer import DropPath
from dinov2_fast.bench.setting import StepSetting
from dinov2_fast.config import ModelConfig, OptimizerConfig, ScheduleConfig
from dinov2_fast.errors import ConfigError
from dinov2_fast.models.presets import ARCHITECTURES
from dinov2_fast.train.schedules import Schedules

SETTING = StepSetting(
    arch="debug", prototypes=96, batch_size=3, drop_ratio=0.0, global_px=112, local_px=42, threads=1
)
TEMPERATURE = 0.05
VALUES = Schedules(ScheduleConfig(), OptimizerConfig(), 3).at(60_000)


def pair_of_steps(monkeypatch, setting: StepSetting = SETTING) -> tuple[EagerStep, FastStep]:
    """Both with the same weights, LayerScale large enough for images to differ."""
    configs = StepSetting.configs

    def scaled(self: StepSetting):
        model, loss, crops = configs(self)
        return dataclasses.replace(model, layer_scale=1.0), loss, crops

    monkeypatch.setattr(StepSetting, "configs", scaled)
    eager, fast = build("reference", setting), build("fast", setting)
    assert isinstance(eager, EagerStep)
    assert isinstance(fast, FastStep)
    eager.load(fast.pair.student.state_dict())
    return eager, fast


@pytest.mark.parametrize("arch", ["debug", "swiglu"])
def test_losses_and_gradients_are_those_of_the_fast_step(monkeypatch, arch):
    if arch == "swiglu":
        shape = dataclasses.replace(SETTING.architecture, ffn="swiglu")
        monkeypatch.setitem(ARCHITECTURES, "debug", shape)
    eager, fast = pair_of_steps(monkeypatch)
    batch = SETTING.batch()

    theirs = eager.losses(batch, teacher_temperature=TEMPERATURE)
    ours = fast.losses(batch, teacher_temperature=TEMPERATURE)
    theirs["total"].backward()
    ours["total"].backward()

    ours["dino"] = ours["dino_global"] + ours["dino_local"]
    for name, value in theirs.items():
        assert value.item() == pytest.approx(ours[name].item(), rel=1e-5), name
    gradients = {name: p.grad for name, p in fast.pair.student.named_parameters()}
    errors = {
        name: ((p.grad - gradients[name]).norm() / gradients[name].norm()).item()
        for name, p in eager.student.named_parameters()
    }
    assert errors.keys() == gradients.keys()
    assert max(errors.values()) <= 1e-4, errors


def test_the_teacher_moves_and_follows_the_student(monkeypatch):
    eager, _ = pair_of_steps(monkeypatch)
    before = {name: p.clone() for name, p in eager.teacher.named_parameters()}

    eager(SETTING.batch(), VALUES)

    after = dict(eager.student.named_parameters())
    for name, average in eager.teacher.named_parameters():
        expected = before[name] * VALUES.momentum + after[name] * (1 - VALUES.momentum)
        torch.testing.assert_close(average, expected)
        assert not torch.equal(before[name], after[name])


def test_centres_take_part_from_the_second_step_on(monkeypatch):
    eager, _ = pair_of_steps(monkeypatch)
    batch = SETTING.batch()
    first = eager.losses(batch, teacher_temperature=TEMPERATURE)
    second = eager.losses(batch, teacher_temperature=TEMPERATURE)
    assert first["dino"].item() != second["dino"].item()
    assert first["koleo"].item() == second["koleo"].item()


def test_a_whole_step_in_bfloat16_changes_every_weight():
    # Small: without instructions for it, torch multiplies bfloat16 a number at a time.
    setting = dataclasses.replace(
        SETTING, dtype="bf16", drop_ratio=0.4, batch_size=2, global_px=56, local_px=14
    )
    step = build("reference", setting)
    assert isinstance(step, EagerStep)
    before = {name: p.clone() for name, p in step.student.named_parameters()}
    losses = step(setting.batch(), VALUES)
    assert all(value.isfinite() for value in losses.values())
    unchanged = [n for n, p in step.student.named_parameters() if torch.equal(p, before[n])]
    assert not unchanged


def test_drop_path_keeps_the_mean_and_masks_whole_samples():
    torch.manual_seed(0)
    layer = DropPath(0.4).train()
    out = layer(torch.ones(4000, 2, 3))
    values = sorted(set(out.flatten().tolist()))
    assert values == pytest.approx([0.0, 1 / 0.6])
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(layer.eval()(out), out)


def test_operations_are_those_torch_counts():
    step = build("reference", SETTING)
    batch = SETTING.batch()
    with FlopCounterMode(display=False) as counter:
        step(batch, VALUES)
    koleo = 2 * 2 * SETTING.batch_size**2 * SETTING.architecture.embed_dim
    assert counter.get_total_flops() == eager_flops(SETTING) + koleo


def test_the_fast_step_needs_fewer_operations():
    dropping = dataclasses.replace(SETTING, drop_ratio=0.4)
    assert fast_flops(SETTING) < eager_flops(SETTING) == eager_flops(dropping)
    assert fast_flops(dropping) < fast_flops(SETTING)


def test_what_the_reference_lacks_is_refused():
    loss = SETTING.configs()[1]
    with pytest.raises(ConfigError, match="no registers"):
        EagerStep(
            ModelConfig(arch="vits14_reg4"),
            loss,
            SETTING.configs()[2],
            OptimizerConfig(),
            precision="fp32",
            device="cpu",
        )


def test_batches_have_the_recipes_masks():
    setting = dataclasses.replace(SETTING, batch_size=5)
    batch = setting.batch()
    masked = batch.masks.sum(dim=1)
    assert (masked > 0).sum() == 5  # half of ten global crops
    assert batch.num_masked == masked.sum()
    ratios = [count / batch.masks.shape[1] for count in masked.tolist() if count]
    assert 0.1 < statistics.mean(ratios) < 0.5
    assert torch.equal(batch.masks, setting.batch().masks)
