"""The published architectures, and models built from a name and differences."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch

from dinov2_fast.errors import ConfigError
from dinov2_fast.models.vision_transformer import VisionTransformer


@dataclass(frozen=True)
class Architecture:
    """What the name of an architecture stands for."""

    embed_dim: int
    """C, width of the token vectors."""
    depth: int
    """Number of blocks."""
    num_heads: int
    """H, attention heads."""
    ffn: Literal["mlp", "swiglu"] = "mlp"
    """Feed-forward layer. The published L is an MLP; the paper's L from scratch is SwiGLU."""
    num_registers: int = 0
    """Register tokens."""
    patch_size: int = 14
    """Side of a patch in pixels."""

    @property
    def position_resize(self) -> Literal["official", "antialias"]:
        """How the published weights with this number of registers resize position embeddings."""
        return "antialias" if self.num_registers else "official"


_PLAIN = {
    "vits14": Architecture(embed_dim=384, depth=12, num_heads=6),
    "vitb14": Architecture(embed_dim=768, depth=12, num_heads=12),
    "vitl14": Architecture(embed_dim=1024, depth=24, num_heads=16),
    "vitg14": Architecture(embed_dim=1536, depth=40, num_heads=24, ffn="swiglu"),
}

ARCHITECTURES: dict[str, Architecture] = {
    **_PLAIN,
    **{f"{name}_reg4": replace(plain, num_registers=4) for name, plain in _PLAIN.items()},
    "debug": Architecture(embed_dim=64, depth=2, num_heads=1),
}


def create_model(
    arch: str = "vits14",
    *,
    image_px: int = 518,
    device: torch.device | str | None = None,
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    ffn: Literal["mlp", "swiglu"] | None = None,
    num_registers: int | None = None,
    drop_ratio: float = 0.0,
    layer_scale: float = 1e-5,
    position_resize: Literal["preset", "official", "antialias"] = "preset",
    recompute: Literal["none", "mlp", "block"] = "none",
) -> VisionTransformer:
    """A model with fresh weights; whatever is None comes from the architecture.

    Args:
        arch: a key of `ARCHITECTURES`.
        image_px: side of the square image whose patches the position embeddings stand for.
        device: where the model ends up. Weights are drawn on the CPU, so that a seed means the
            same model everywhere; `meta` draws and stores nothing.
        patch_size: side of a patch in pixels.
        embed_dim: C.
        depth: number of blocks.
        num_heads: H.
        ffn: `mlp` or `swiglu`.
        num_registers: register tokens.
        drop_ratio: share of samples each residual branch skips in training.
        layer_scale: initial value of the LayerScale vectors.
        position_resize: `official`, `antialias`, or `preset`: antialias with registers, official
            without, as the published weights expect.
        recompute: what blocks compute anew in the backward pass instead of keeping it.
    Raises:
        ConfigError: unknown architecture, or values that do not make a model.
    """
    preset = architecture(arch)
    overrides = {
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "ffn": ffn,
        "num_registers": num_registers,
    }
    shape = replace(preset, **{key: value for key, value in overrides.items() if value is not None})
    try:
        with torch.device("meta"):
            model = VisionTransformer(
                image_px=image_px,
                drop_ratio=drop_ratio,
                layer_scale=layer_scale,
                position_resize=(
                    shape.position_resize if position_resize == "preset" else position_resize
                ),
                recompute=recompute,
                **{field.name: getattr(shape, field.name) for field in fields(shape)},
            )
    except ValueError as error:
        raise ConfigError(f"model: arch {arch} cannot be built: {error}") from error
    if device is not None and torch.device(device).type == "meta":
        return model
    # Drawn once: built on the CPU, every layer would first draw torch's own initial weights.
    # Not by to_empty, whose empty_like of a meta tensor imports sympy, two seconds of it.
    model = model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))
    model.reset_parameters()
    return model if device is None else model.to(device)


def architecture(name: str) -> Architecture:
    """The architecture of a name.

    Raises:
        ConfigError: no such name; the message has the nearest one.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    nearest = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.3)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    raise ConfigError(f"model.arch: expected one of {', '.join(ARCHITECTURES)}, got {name!r}{hint}")
