"""A folder that the transformers library loads: configuration, preprocessing, weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2_fast.errors import CheckpointError, OutputError
from dinov2_fast.models.weight_files import write_safetensors, write_whole


def write_transformers_folder(
    folder: Path, state: Mapping[str, Tensor], shape: Mapping[str, Any]
) -> None:
    """Write `config.json`, `preprocessor_config.json` and `model.safetensors`.

    Args:
        folder: made if it does not exist; files of these names are replaced.
        state: names on disk, the `hf` layout.
        shape: keyword arguments of the `VisionTransformer`.
    Raises:
        OutputError: the folder cannot be written.
    """
    config = model_config(shape, dtype=str(next(iter(state.values())).dtype))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"weights: {folder} cannot be made: {error}") from error
    for name, values in (
        ("config.json", config),
        ("preprocessor_config.json", _preprocessing()),
    ):
        text = json.dumps(values, indent=2) + "\n"
        write_whole(folder / name, lambda part, text=text: _write_text(part, text))
    write_safetensors(folder / "model.safetensors", state, {"format": "pt"})


def model_config(shape: Mapping[str, Any], *, dtype: str) -> dict[str, Any]:
    """Fields of `Dinov2Config` or, with registers, of `Dinov2WithRegistersConfig`.

    Args:
        shape: keyword arguments of the `VisionTransformer`.
        dtype: of the weights, as torch prints it.
    Raises:
        CheckpointError: a model that these classes cannot describe.
    """
    registers, mlp_ratio = shape["num_registers"], int(shape["mlp_ratio"])
    if mlp_ratio != shape["mlp_ratio"]:
        raise CheckpointError(
            "convert: transformers describes only models whose hidden width is a multiple of "
            f"their width, got mlp_ratio {shape['mlp_ratio']}; use --to official or --to timm"
        )
    config: dict[str, Any] = {
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "hidden_size": shape["embed_dim"],
        "num_hidden_layers": shape["depth"],
        "num_attention_heads": shape["num_heads"],
        "mlp_ratio": mlp_ratio,
        "use_swiglu_ffn": shape["ffn"] == "swiglu",
        "image_size": shape["image_px"],
        "patch_size": shape["patch_size"],
        "num_channels": shape["in_channels"],
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "torch_dtype": dtype.removeprefix("torch."),
    }
    return config | ({"num_register_tokens": registers} if registers else {"use_mask_token": True})


def _preprocessing() -> dict[str, Any]:
    """What DINOv2 evaluates with: shorter side 256 bicubic, centre 224, ImageNet statistics."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
