"""Which precision `run.precision: auto` means, decided once for a run and kept when it goes on."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
import yaml

from dinov2_fast.config import Config
from dinov2_fast.ops._matmul import has_fast_bfloat16
from dinov2_fast.train.run_directory import RunDirectory

Precision = Literal["fp32", "bf16"]


def choose_precision(device: torch.device) -> Precision:
    """bf16 where the processor multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and has_fast_bfloat16() else "fp32"


def with_precision(config: Config, files: RunDirectory, device: torch.device) -> Config:
    """The configuration with a precision in place of `auto`.

    A run keeps the one it began with, wherever it goes on.

    Args:
        config: the run.
        files: its directory; an earlier start has left its configuration there.
        device: where the networks will live.
    """
    if config.run.precision != "auto":
        return config
    return config.updated({"run.precision": _former(files) or choose_precision(device)})


def _former(files: RunDirectory) -> str | None:
    """The precision in the directory's configuration, if there is one."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        former = yaml.safe_load(files.config.read_text(encoding="utf-8"))["run"]["precision"]
        return former if former in ("fp32", "bf16") else None
    return None
