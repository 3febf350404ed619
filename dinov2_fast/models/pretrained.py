"""Weights into models: strict loading, models from files, files from one layout to another."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dinov2_fast.errors import CheckpointError, ConfigError
from dinov2_fast.models.mismatch import mismatch
from dinov2_fast.models.presets import ARCHITECTURES
from dinov2_fast.models.state_dict_formats import (
    LAYOUTS,
    Layout,
    block_indices,
    conversion_notes,
    detect_format,
    from_official,
    split_dump,
    to_official,
)
from dinov2_fast.models.training_dumps import head_to_official, head_to_parametrized
from dinov2_fast.models.transformers_folder import write_transformers_folder
from dinov2_fast.models.vision_transformer import VisionTransformer
from dinov2_fast.models.weight_files import (
    DESCRIPTION_KEY,
    load_weights,
    read_weight_file,
    write_pickle,
    write_safetensors,
)

__all__ = [
    "Conversion",
    "backbone_metadata",
    "convert_file",
    "detect_format",
    "from_official",
    "head_to_official",
    "head_to_parametrized",
    "infer_shape",
    "load_backbone",
    "load_into",
    "load_weights",
    "save_backbone",
    "split_dump",
    "to_official",
]


@dataclass(frozen=True)
class Conversion:
    """What `convert_file` did; as text, what a person wants to read."""

    source: Path
    target: Path
    source_layout: Layout
    target_layout: Layout
    num_parameters: int
    shape: dict[str, Any]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Several lines."""
        shape = self.shape
        lines = [
            f"{self.source}: {LAYOUTS[self.source_layout]}",
            f"{self.target}: {LAYOUTS[self.target_layout]}",
            f"{_name_of(shape) or 'no published architecture'}: {self.num_parameters:,} parameters "
            f"in the official layout, width {shape['embed_dim']}, {shape['depth']} blocks, "
            f"{shape['ffn']}, {shape['num_registers']} registers, patch {shape['patch_size']} px, "
            f"image {shape['image_px']} px",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def load_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights; every parameter must be there with its shape, and nothing else.

    A model on `meta` takes the tensors over, in its own dtype; otherwise they are copied.

    Args:
        model: a backbone, or a head.
        state: keys of the model, for a backbone official ones.
    Raises:
        CheckpointError: lists what is missing, unexpected and mis-shaped, and the way out.
    """
    expected = model.state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    misshaped = [
        f"{key} expected {tuple(tensor.shape)}, got {tuple(state[key].shape)}"
        for key, tensor in expected.items()
        if key in state and tensor.shape != state[key].shape
    ]
    misshaped += [
        f"{key} expected a floating-point type, got {state[key].dtype}"
        for key in expected
        if key in state and not state[key].is_floating_point()
    ]
    if missing or unexpected or misshaped:
        raise mismatch(
            "weights: they do not fit the model; nothing was loaded",
            missing=missing,
            unexpected=unexpected,
            misshaped=misshaped,
            ways_out=_ways_out(model, state),
        )
    on_meta = any(tensor.is_meta for tensor in expected.values())
    tensors = {key: state[key].to(tensor.dtype) for key, tensor in expected.items()}
    model.load_state_dict(tensors, strict=True, assign=on_meta)


def load_backbone(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    num_heads: int | None = None,
    position_resize: Literal["preset", "official", "antialias"] = "preset",
) -> VisionTransformer:
    """A backbone in float32 from a weight file of any known layout; shapes tell its architecture.

    Args:
        path: see `load_weights`.
        device: where the model ends up.
        num_heads: H, where neither the file nor a published architecture tells it.
        position_resize: `preset` takes what the file states, else antialias with registers and
            official without.
    Raises:
        CheckpointError: unreadable, of no known layout, or keys and shapes that do not fit.
    """
    file = read_weight_file(path)
    official = to_official(file.state)
    shape = infer_shape(official)
    shape["num_heads"] = num_heads or _num_heads(shape, file.description)
    resize = position_resize
    if resize == "preset":
        resize = file.description.get(
            "position_resize", "antialias" if shape["num_registers"] else "official"
        )
    model = _on_meta(shape, position_resize=resize)
    load_into(model, official)
    return model.to(device)


def save_backbone(model: VisionTransformer, path: str | Path) -> None:
    """Write a backbone under official names, with what `load_backbone` cannot read off shapes.

    Args:
        model: the backbone.
        path: a name that ends in .safetensors.
    Raises:
        ConfigError: another name.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"save_backbone: expected a name ending in .safetensors, got {path.name}")
    write_safetensors(path, model.state_dict(), backbone_metadata(model))


def backbone_metadata(model: VisionTransformer) -> dict[str, str]:
    """Metadata for a safetensors file of the model's weights."""
    description = {"num_heads": model.num_heads, "position_resize": model.position_resize}
    return {DESCRIPTION_KEY: json.dumps(description)}


def convert_file(
    source: str | Path, target: str | Path, to: Literal["official", "timm", "hf"]
) -> Conversion:
    """Translate a file of backbone weights; values and dtypes stay as they are.

    Args:
        source: see `load_weights`; the layout is recognised by its keys.
        target: `official`: .safetensors or .pth; `timm`: .safetensors; `hf`: .safetensors, or a
            folder (a name without suffix) that transformers loads. Replaced if it exists,
            unless it is the source, since a layout may leave something out.
        to: layout to write.
    Returns:
        What was found and done.
    Raises:
        ConfigError: a target that the layout cannot be written to.
        CheckpointError: a source that is no backbone of a known layout.
        OutputError: the target cannot be written.
    """
    source, target = Path(source), Path(target)
    suffixes = {"official": (".safetensors", ".pth"), "timm": (".safetensors",)}
    allowed = {**suffixes, "hf": (".safetensors", "")}.get(to)
    if allowed is None:
        raise ConfigError(f"convert: expected --to to be official, timm or hf, got {to!r}")
    if target.suffix not in allowed:
        wanted = " or ".join(suffix or "no suffix (a folder)" for suffix in allowed)
        raise ConfigError(f"convert: expected OUT with {wanted} for --to {to}, got {target.name}")
    if source.exists() and target.exists() and target.samefile(source):
        raise ConfigError(f"convert: {source} would be replaced by its copy; choose another OUT")
    file = read_weight_file(source)
    layout = detect_format(file.state)
    official = to_official(file.state)
    shape = infer_shape(official)
    with_heads = {**shape, "num_heads": file.description.get("num_heads", shape["embed_dim"])}
    load_into(_on_meta(with_heads, position_resize="official"), official)  # keys and shapes
    converted = from_official(official, to)
    if target.suffix == ".pth":
        write_pickle(target, converted)
    elif target.suffix:
        # transformers reads only files that call themselves "pt".
        described = {DESCRIPTION_KEY: json.dumps(file.description)} if file.description else {}
        write_safetensors(target, converted, {"format": "pt"} if to == "hf" else described)
    else:
        shape["num_heads"] = _num_heads(shape, file.description)
        write_transformers_folder(target, converted, shape)
    return Conversion(
        source=source,
        target=target,
        source_layout=layout,
        target_layout=to,
        num_parameters=sum(tensor.numel() for tensor in official.values()),
        shape=shape,
        notes=tuple(conversion_notes(layout, to, official)),
    )


def infer_shape(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of `VisionTransformer` that shapes tell; `num_heads` is not among them.

    Args:
        state: official keys.
    Raises:
        CheckpointError: shapes that no vision transformer has.
    """
    _, positions, embed_dim = _dimensions(state, "pos_embed", 3)
    _, in_channels, patch_size, _ = _dimensions(state, "patch_embed.proj.weight", 4)
    side = math.isqrt(max(positions - 1, 0))
    if side < 1 or side * side != positions - 1 or min(embed_dim, in_channels, patch_size) < 1:
        raise mismatch(
            "weights: expected the position of CLS and those of a square grid of patches",
            misshaped=[f"pos_embed got {tuple(state['pos_embed'].shape)}"],
        )
    swiglu = "blocks.0.mlp.w12.weight" in state
    hidden = 4 * embed_dim
    if not swiglu:
        hidden, _ = _dimensions(state, "blocks.0.mlp.fc1.weight", 2)
    mlp_ratio = hidden / embed_dim
    if int(embed_dim * mlp_ratio) != hidden:  # a layer truncates the product
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    registers = 0
    if "register_tokens" in state:
        _, registers, _ = _dimensions(state, "register_tokens", 3)
    return {
        "image_px": side * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "embed_dim": embed_dim,
        "depth": len(block_indices(state)),
        "mlp_ratio": mlp_ratio,
        "ffn": "swiglu" if swiglu else "mlp",
        "num_registers": registers,
    }


def _dimensions(state: Mapping[str, Tensor], key: str, count: int) -> tuple[int, ...]:
    if key not in state:
        raise mismatch("weights: expected an official backbone", missing=[key])
    shape = tuple(state[key].shape)
    if len(shape) != count:
        raise mismatch(
            "weights: expected the shapes of a vision transformer",
            misshaped=[f"{key} expected {count} dimensions, got {shape}"],
        )
    return shape


def _on_meta(
    shape: Mapping[str, Any], *, position_resize: Literal["official", "antialias"]
) -> VisionTransformer:
    """The model of inferred shapes without memory behind it."""
    try:
        with torch.device("meta"):
            return VisionTransformer(**shape, position_resize=position_resize, layer_scale=1.0)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"weights: no model has these shapes: {error}") from error


def _num_heads(shape: Mapping[str, Any], description: Mapping[str, Any]) -> int:
    """H, from the file or from the published architecture of these shapes; never a guess."""
    stated = description.get("num_heads")
    if isinstance(stated, int):
        return stated
    name = _name_of(shape)
    if name is None:
        raise CheckpointError(
            f"weights: expected a published architecture, got width {shape['embed_dim']} with "
            f"{shape['depth']} blocks ({shape['ffn']}), whose number of heads no shape tells; "
            "pass num_heads to load_backbone, or save the file with save_backbone"
        )
    return ARCHITECTURES[name].num_heads


def _name_of(shape: Mapping[str, Any]) -> str | None:
    """The architecture of inferred shapes; its number of registers and patch size may be others."""
    fields = ("embed_dim", "depth")
    fits = [
        name
        for name, preset in ARCHITECTURES.items()
        if all(getattr(preset, field) == shape[field] for field in fields)
        and shape["mlp_ratio"] == 4
    ]
    exact = ("ffn", "num_registers", "patch_size")
    fits.sort(key=lambda name: [getattr(ARCHITECTURES[name], key) != shape[key] for key in exact])
    return fits[0] if fits else None


def _ways_out(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """How to make model and weights fit, as far as the keys tell."""
    if not isinstance(model, VisionTransformer):
        return []
    try:
        layout = detect_format(state)
        shape = infer_shape(to_official(state))
    except CheckpointError:
        return []
    name = _name_of(shape)
    preset = ARCHITECTURES.get(name or "")
    keys = ("image_px", "patch_size", "embed_dim", "depth", "ffn", "num_registers")
    arguments = [repr(name)] if name else []
    arguments += [
        f"{key}={shape[key]!r}"
        for key in keys
        if key == "image_px" or preset is None or getattr(preset, key) != shape[key]
    ]
    ways = []
    if layout != "official":
        ways.append(f"the keys are in the {layout} layout: load to_official(state)")
    if shape["image_px"] != model.image_px and shape["patch_size"] == model.patch_size:
        ways.append(
            f"the position embeddings are those of images of {shape['image_px']} px: create the "
            f"model with image_px={shape['image_px']}; it takes other sizes all the same"
        )
    if shape["num_registers"] != model.num_registers:
        which = "with" if shape["num_registers"] else "without"
        ways.append(
            f"the weights have {shape['num_registers']} register tokens, the model "
            f"{model.num_registers}: use the architecture {which} _reg4"
        )
    if any(getattr(model, key) != shape[key] for key in keys):
        ways.append(f"the weights fit create_model({', '.join(arguments)})")
    return ways
