"""Backbones: architectures, the vision transformer, weights in every known layout."""

from __future__ import annotations

from dinov2_fast.models.presets import ARCHITECTURES, Architecture, create_model
from dinov2_fast.models.pretrained import convert_file, load_backbone, load_into, load_weights
from dinov2_fast.models.vision_transformer import VisionTransformer

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "VisionTransformer",
    "convert_file",
    "create_model",
    "load_backbone",
    "load_into",
    "load_weights",
]
