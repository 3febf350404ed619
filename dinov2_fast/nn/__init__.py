"""Layers with official DINOv2's parameter names; all arithmetic is in `dinov2_fast.ops`."""

from __future__ import annotations

from dinov2_fast.nn.attention import Attention, MemEffAttention
from dinov2_fast.nn.block import Block, NestedTensorBlock
from dinov2_fast.nn.drop_path import DropPath
from dinov2_fast.nn.head import DINOHead, Prototypes
from dinov2_fast.nn.layer_norm import LayerNorm
from dinov2_fast.nn.layer_scale import LayerScale
from dinov2_fast.nn.mlp import Mlp
from dinov2_fast.nn.patch_embed import PatchEmbed
from dinov2_fast.nn.swiglu import SwiGLUFFN, SwiGLUFFNFused

__all__ = [
    "Attention",
    "Block",
    "DINOHead",
    "DropPath",
    "LayerNorm",
    "LayerScale",
    "MemEffAttention",
    "Mlp",
    "NestedTensorBlock",
    "PatchEmbed",
    "Prototypes",
    "SwiGLUFFN",
    "SwiGLUFFNFused",
]
