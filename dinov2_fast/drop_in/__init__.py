"""The fast paths for models and calls that people already have: timm, transformers, flash-attn."""

from __future__ import annotations

from dinov2_fast.drop_in.accelerate import accelerate, restore
from dinov2_fast.drop_in.report import Entry, Report

__all__ = ["Entry", "Report", "accelerate", "restore"]
