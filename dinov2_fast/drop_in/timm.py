"""Blocks of timm's VisionTransformer: dinov2, dinov2_reg4, plain ViTs, deit3."""

from __future__ import annotations

from typing import Any

from torch import nn

from dinov2_fast.drop_in.fast_block import FastBlock
from dinov2_fast.drop_in.half_block import HalfBlock
from dinov2_fast.drop_in.known_types import (
    DROPOUT,
    GELU,
    IDENTITY,
    LAYER_NORM,
    LINEAR,
    SILU,
    gelu_difference,
    layer_of,
    parts_of,
    ratio_of,
)

BLOCKS = frozenset({"timm.models.vision_transformer.Block"})

_NORM = LAYER_NORM | {"timm.layers.norm.LayerNorm"}
_LAYER_SCALE = IDENTITY | {
    "timm.layers.layer_scale.LayerScale",
    "timm.models.vision_transformer.LayerScale",
}
_DROP_PATH = IDENTITY | {"timm.layers.drop.DropPath"}
_ATTENTION = {
    "norm1": _NORM,
    "attn": frozenset(
        {"timm.layers.attention.Attention", "timm.models.vision_transformer.Attention"}
    ),
    "attn.qkv": LINEAR,
    "attn.q_norm": IDENTITY,
    "attn.k_norm": IDENTITY,
    "attn.attn_drop": DROPOUT,
    "attn.norm": IDENTITY,
    "attn.proj": LINEAR,
    "attn.proj_drop": DROPOUT,
    "ls1": _LAYER_SCALE,
    "drop_path1": _DROP_PATH,
}
_FEED_FORWARD = {
    "norm2": _NORM,
    "mlp": frozenset({"timm.layers.mlp.Mlp", "timm.layers.mlp.GluMlp"}),
    "mlp.fc1": LINEAR,
    "mlp.act": GELU | SILU,
    "mlp.drop1": DROPOUT,
    "mlp.norm": IDENTITY,
    "mlp.fc2": LINEAR,
    "mlp.drop2": DROPOUT,
    "ls2": _LAYER_SCALE,
    "drop_path2": _DROP_PATH,
}


class FastTimmBlock(FastBlock):
    """A block of timm's VisionTransformer."""

    @staticmethod
    def halves(block: nn.Module) -> tuple[HalfBlock, HalfBlock]:
        """See `FastBlock.halves`."""
        return _attention_half(block), _feed_forward_half(block)

    @staticmethod
    def drop_ratio(block: Any) -> float:
        """See `FastBlock.drop_ratio`."""
        return max(ratio_of(block.drop_path1), ratio_of(block.drop_path2))


def _attention_half(block: Any) -> HalfBlock:
    attention, drop_path = block.attn, block.drop_path1
    head_dim, scale = getattr(attention, "head_dim", 1), getattr(attention, "scale", None)
    difference = _drop_path_difference(drop_path)
    if getattr(attention, "gate", None) is not None or getattr(attention, "qkv", None) is None:
        difference = "attn has a gate or separate projections"
    elif scale != head_dim**-0.5:
        difference = f"attn scales scores by {scale}"
    return HalfBlock(
        kind="attention",
        norm=block.norm1,
        first=(layer_of(attention, "qkv"),),
        second=layer_of(attention, "proj"),
        gamma=getattr(block.ls1, "gamma", None),
        layer_scale=block.ls1,
        drop_path=drop_path,
        drop_ratio=ratio_of(drop_path),
        inner=attention,
        parts=parts_of(block, _ATTENTION),
        difference=difference,
        num_heads=getattr(attention, "num_heads", 1),
        head_dim=head_dim,
    )


def _feed_forward_half(block: Any) -> HalfBlock:
    layers, drop_path = block.mlp, block.drop_path2
    gated = type(layers).__name__ == "GluMlp"
    difference = _drop_path_difference(drop_path)
    if gated and (layers.gate_last or type(layers.act) is not nn.SiLU):
        difference = "mlp gates with another layout or activation than SwiGLU's"
    elif not gated:
        difference = gelu_difference(getattr(layers, "act", None)) or difference
    return HalfBlock(
        kind="swiglu" if gated else "gelu",
        norm=block.norm2,
        first=(layer_of(layers, "fc1"),),
        second=layer_of(layers, "fc2"),
        gamma=getattr(block.ls2, "gamma", None),
        layer_scale=block.ls2,
        drop_path=drop_path,
        drop_ratio=ratio_of(drop_path),
        inner=layers,
        parts=parts_of(block, _FEED_FORWARD),
        difference=difference,
    )


def _drop_path_difference(drop_path: nn.Module) -> str:
    """Why a drop path does something else than keep samples and scale them up, or ""."""
    if not getattr(drop_path, "scale_by_keep", True):
        return "drop path does not scale up what it keeps"
    return "" if ratio_of(drop_path) < 1 else "drop path drops every sample"
