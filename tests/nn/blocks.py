"""Blocks as DINOv2's vision transformer makes them, by the words of this project's models."""

from __future__ import annotations

from typing import Any

import torch

from dinov2_fast.models.vision_transformer import FFN_LAYERS
from dinov2_fast.nn import Block, LayerNorm


def make_block(
    ffn: str = "mlp",
    dim: int = 32,
    num_heads: int = 2,
    *,
    drop_ratio: float = 0.0,
    layer_scale: float | None = 0.7,
    **options: Any,
) -> Block:
    """A block with the same parameters each time, whose branches LayerScale lets matter."""
    torch.manual_seed(0)
    return Block(
        dim,
        num_heads,
        **{"qkv_bias": True, "norm_layer": LayerNorm, **options},
        ffn_layer=FFN_LAYERS[ffn],
        drop_path=drop_ratio,
        init_values=layer_scale,
    )
