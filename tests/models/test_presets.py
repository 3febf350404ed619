"""Architectures by name: sizes, parameter counts, overrides, messages."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from dinov2_fast.config import ModelConfig
from dinov2_fast.errors import ConfigError
from dinov2_fast.models import ARCHITECTURES, create_model

# At 518 px and patch 14. Source: arithmetic over the published shapes.
NUM_PARAMETERS = {
    "vits14": 22_056_576,
    "vitb14": 86_580_480,
    "vitl14": 304_368_640,
    "vitg14": 1_136_480_768,
    "vits14_reg4": 22_056_576 + 4 * 384,
    "vitb14_reg4": 86_580_480 + 4 * 768,
    "vitl14_reg4": 304_368_640 + 4 * 1024,
    "vitg14_reg4": 1_136_480_768 + 4 * 1536,
}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("arch", sorted(NUM_PARAMETERS))
def test_parameter_counts_are_the_published_ones(arch):
    assert count(create_model(arch, device="meta")) == NUM_PARAMETERS[arch]


def test_every_architecture_is_covered():
    assert set(ARCHITECTURES) == {*NUM_PARAMETERS, "debug"}


@pytest.mark.parametrize(
    ("arch", "shape"),
    [
        ("vits14", (384, 12, 6, "mlp")),
        ("vitb14", (768, 12, 12, "mlp")),
        ("vitl14", (1024, 24, 16, "mlp")),
        ("vitg14", (1536, 40, 24, "swiglu")),
        ("debug", (64, 2, 1, "mlp")),
    ],
)
def test_shapes(arch, shape):
    model = create_model(arch, device="meta")

    assert (model.embed_dim, model.depth, model.num_heads, model.ffn) == shape
    assert model.num_features == model.embed_dim
    assert model.patch_size == 14
    assert model.pos_embed.shape == (1, 1 + 37 * 37, model.embed_dim)
    assert len(model.blocks) == model.depth


def test_swiglu_large_of_the_paper():
    model = create_model("vitl14", ffn="swiglu", device="meta")

    assert model.blocks[0].mlp.w12.weight.shape == (2 * 2736, 1024)
    assert model.blocks[0].mlp.w3.weight.shape == (1024, 2736)


def test_position_resize_follows_the_registers_unless_told():
    def resize(arch: str, **options) -> str:
        return create_model(arch, device="meta", **options).position_resize

    assert resize("vits14") == "official"
    assert resize("vits14_reg4") == "antialias"
    assert resize("vits14", num_registers=2) == "antialias"
    assert resize("vits14_reg4", num_registers=0) == "official"
    assert resize("vits14", position_resize="antialias") == "antialias"
    assert resize("vits14_reg4", position_resize="official") == "official"


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_recompute_reaches_every_block(recompute):
    model = create_model("debug", recompute=recompute, device="meta")

    assert [block.recompute for block in model.blocks] == [recompute] * model.depth


def test_giant_on_meta_takes_seconds_and_no_memory():
    begin = time.perf_counter()

    model = create_model("vitg14", device="meta")

    assert time.perf_counter() - begin < 5
    assert all(parameter.is_meta for parameter in model.parameters())


def test_takes_every_field_of_the_model_config():
    fields = {**dataclasses.asdict(ModelConfig()), "arch": "debug"}

    model = create_model(**fields, image_px=56)

    assert model.drop_ratio == ModelConfig().drop_ratio
    assert [block.drop_ratio for block in model.blocks] == [ModelConfig().drop_ratio] * 2
    assert model.blocks[0].ls1.gamma[0].item() == torch.tensor(ModelConfig().layer_scale).item()


def test_overrides_win_over_the_preset():
    model = create_model(
        "debug", image_px=64, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_registers=2
    )

    assert (model.patch_size, model.embed_dim, model.depth, model.num_heads) == (8, 48, 3, 4)
    assert model.register_tokens is not None
    assert model.register_tokens.shape == (1, 2, 48)
    assert model.pos_embed.shape == (1, 65, 48)
    assert model(torch.zeros(1, 3, 24, 40)).shape == (1, 48)


def test_weights_are_the_seeds():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(create_model("debug", image_px=56, device="cpu").state_dict())

    first, again, other = states
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["pos_embed"], other["pos_embed"])


def test_a_device_context_around_it_changes_nothing():
    with torch.device("meta"):
        model = create_model("debug", image_px=56)

    assert model.pos_embed.device.type == "cpu"
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "vit_s14"}, r"got 'vit_s14' \(did you mean vits14"),
        ({"arch": "resnet"}, "expected one of vits14"),
        ({"num_heads": 7}, "multiple of num_heads, got dim 384 and num_heads 7"),
        ({"image_px": 225}, "multiples of the patch size 14, got 225 x 225; .* 224 x 224"),
        ({"depth": 0}, "expected embed_dim, depth"),
        ({"ffn": "moe"}, "expected ffn to be one of mlp, swiglu"),
        ({"drop_ratio": 1.0}, r"drop_ratio in \[0, 1\)"),
        ({"position_resize": "nearest"}, "expected position_resize to be one of official"),
    ],
)
def test_what_makes_no_model_is_a_configuration_error(options, message):
    with pytest.raises(ConfigError, match=message):
        create_model(**{"arch": "vits14", **options})
