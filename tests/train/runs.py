"""Tiny real runs on generated pictures, and how to compare two of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinov2_fast.config import Config, load_config
from dinov2_fast.train.metrics import TIMING_FIELDS

# 9 steps, saved at 4 and 8 and at the end: a resume can start at, before and after a multiple.
SETTINGS = {
    "crops.num_local": 2,
    "schedule.total_steps": 9,
    "run.batch_size": 4,
    "run.checkpoint_every_steps": 4,
    "run.device": "cpu",
    "run.num_threads": 1,
    "data.num_workers": 0,
}


def write_pictures(folder: Path, count: int = 12) -> Path:
    """Smooth random pictures of one size, the same at every call."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        small = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((70, 60), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:02d}.png")
    return folder


def tiny_config(data: Path, **overrides: Any) -> Config:
    """The debug preset on pictures of `write_pictures`; keyword `a__b` stands for `a.b`."""
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config("debug", {**SETTINGS, "data.path": str(data), **named})


def command_words(config: Config, out: Path) -> list[str]:
    """The arguments of `dinov2-fast` that mean the same run."""
    words = ["train", "debug", "--data", config.data.path, "--out", str(out)]
    for key, value in SETTINGS.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return words


def result_of(out: Path) -> dict[str, Any]:
    """What two equal computations must leave equal: weights, all final state, metrics."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (last,) = sorted(out.glob("checkpoints/step-*"))[-1:]
    return {
        "teacher": (out / "teacher.safetensors").read_bytes(),
        "state": (last / "state.safetensors").read_bytes(),
        "metrics": [
            {name: value for name, value in record.items() if name not in TIMING_FIELDS}
            for record in records
        ],
    }


def snapshot(out: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time of change and content."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
