"""The folder for transformers: fields of its configuration, what it cannot describe."""

from __future__ import annotations

import json

import pytest

from dinov2_fast.errors import CheckpointError
from dinov2_fast.models.pretrained import from_official, infer_shape
from dinov2_fast.models.transformers_folder import model_config, write_transformers_folder
from tests.models.weights import tiny_backbone


def shape_of(variant: str, **changes) -> dict:
    return infer_shape(tiny_backbone(variant).state_dict()) | {"num_heads": 1} | changes


def test_fields_of_a_plain_model():
    assert model_config(shape_of("mlp"), dtype="torch.float32") == {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "mlp_ratio": 4,
        "use_swiglu_ffn": False,
        "image_size": 56,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "torch_dtype": "float32",
        "use_mask_token": True,
    }


def test_fields_that_registers_and_swiglu_change():
    plain = model_config(shape_of("mlp"), dtype="torch.float32")
    other = model_config(shape_of("swiglu_reg"), dtype="torch.float32")

    assert {key: other[key] for key in other if other[key] != plain.get(key)} == {
        "model_type": "dinov2_with_registers",
        "architectures": ["Dinov2WithRegistersModel"],
        "use_swiglu_ffn": True,
        "num_register_tokens": 4,
    }
    assert "use_mask_token" not in other


def test_a_hidden_width_that_transformers_cannot_describe_is_refused(tmp_path):
    state = from_official(tiny_backbone().state_dict(), "hf")

    with pytest.raises(CheckpointError, match=r"mlp_ratio 3\.5; use --to official or --to timm"):
        write_transformers_folder(tmp_path / "folder", state, shape_of("mlp", mlp_ratio=3.5))
    assert not (tmp_path / "folder").exists()


def test_the_folder_holds_three_files(tmp_path):
    state = from_official(tiny_backbone().state_dict(), "hf")

    write_transformers_folder(tmp_path / "a" / "folder", state, shape_of("mlp"))

    names = sorted(path.name for path in (tmp_path / "a" / "folder").iterdir())
    assert names == ["config.json", "model.safetensors", "preprocessor_config.json"]
    preprocessing = json.loads((tmp_path / "a/folder/preprocessor_config.json").read_text())
    assert preprocessing["crop_size"] == {"height": 224, "width": 224}
    assert preprocessing["size"] == {"shortest_edge": 256}
