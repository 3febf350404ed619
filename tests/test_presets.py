"""Presets: the published settings of each size, and nothing that repeats a default."""

from __future__ import annotations

import math

import pytest
import yaml

from dinov2_fast.config import PRESET_FOLDER, Config, load_config, to_dict
from dinov2_fast.train.schedules import Schedules

PRESETS = ["vits14", "vitb14", "vitl14", "vitg14", "debug"]


def leaves(values: dict, prefix: str = "") -> dict[str, object]:
    """Dotted key -> value of nested mappings."""
    found = {}
    for key, value in values.items():
        nested = leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        found |= nested if nested is not None else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_holds_only_differences_from_the_defaults(name):
    text = (PRESET_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    defaults, resolved = leaves(to_dict(Config())), leaves(to_dict(load_config(name)))
    repeated = {key for key in leaves(yaml.safe_load(text)) if resolved[key] == defaults[key]}
    # The default architecture is named all the same in the preset that is called after it.
    assert repeated == ({"model.arch"} if name == "vits14" else set())


@pytest.mark.parametrize("name", ["vits14", "vitb14"])
def test_small_presets_are_the_official_default_configuration(name):
    config = load_config(name)
    # The file of official defaults says "centering"; only those of L and g say Sinkhorn-Knopp.
    changes = {"model.arch": name, "loss.centering": "softmax_centering"}
    assert config == Config().updated(changes)
    assert (config.model.drop_ratio, config.loss.separate_ibot_head) == (0.3, False)
    assert config.loss.dino_head.num_prototypes == 65536
    assert config.schedule.total_steps == 100 * 1250
    assert config.optimizer.base_lr == 4e-3


@pytest.mark.parametrize(("name", "processes"), [("vitl14", 96), ("vitg14", 256)])
def test_large_presets_have_the_values_of_the_paper_and_of_official_training(name, processes):
    config = load_config(name)
    global_batch_size = config.run.batch_size * processes
    schedules = Schedules(config.schedule, config.optimizer, global_batch_size)
    assert global_batch_size == 3072
    # The paper rounds to 3.5e-4.
    assert math.isclose(schedules.peak_lr, 3.4641e-4, rel_tol=1e-5)
    assert (config.schedule.total_steps, schedules.warmup_steps) == (625_000, 100_000)
    assert (config.schedule.weight_decay_start, config.schedule.weight_decay_end) == (0.04, 0.2)
    assert (config.schedule.momentum_start, config.schedule.momentum_end) == (0.994, 1.0)
    assert (config.model.drop_ratio, config.model.layer_scale) == (0.4, 1e-5)
    assert config.optimizer.layer_decay == 1.0
    loss = config.loss
    assert loss.separate_ibot_head
    assert loss.centering == "sinkhorn_knopp"
    assert (loss.dino_head.num_prototypes, loss.dino_head.bottleneck_dim) == (131072, 384)
    assert (loss.ibot_head.num_prototypes, loss.ibot_head.bottleneck_dim) == (131072, 256)


def test_the_large_model_from_scratch_has_swiglu_like_the_giant_one():
    from dinov2_fast.models.presets import architecture

    assert load_config("vitl14").model.ffn == "swiglu"
    assert architecture("vitg14").ffn == "swiglu"
    assert architecture("vitl14").ffn == "mlp"


def test_debug_is_small_in_every_direction():
    config = load_config("debug")
    assert (config.model.arch, config.schedule.total_steps, config.run.batch_size) == (
        "debug",
        20,
        8,
    )
    assert (config.crops.global_px, config.crops.local_px) == (56, 28)
    head = config.loss.dino_head
    assert (head.num_prototypes, head.hidden_dim) == (256, 64)
