from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

from tools import measure_learning


@pytest.fixture
def image_set(tmp_path):
    """Two classes that differ in brightness, six training and three test images each."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3)):
        for label, level in (("dark", 60), ("light", 190)):
            folder = tmp_path / "set" / part / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.normal(level, 20, (48, 48, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "set"


def test_a_row_holds_the_median_and_the_range_over_seeds():
    results = [
        {"steps": 5, **dict.fromkeys(measure_learning.COLUMNS.values(), value)}
        for value in (30.0, 10.0, 20.04)
    ]
    row = measure_learning.table_row("photos", results)
    assert row == "| photos | 5 |" + " 20.0 (10.0 to 30.0) |" * 5
    assert measure_learning.table_row("photos", results[:1]).endswith("| 30.0 | 30.0 |")


def test_the_command_measures_every_seed_before_and_after(image_set, tmp_path, monkeypatch, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "model: {arch: debug}\n"
        "crops: {global_px: 28, local_px: 14, num_local: 1}\n"
        "loss: {dino_head: {num_prototypes: 16, hidden_dim: 16, bottleneck_dim: 8}}\n"
        "run: {batch_size: 4, num_threads: 1, device: cpu}\n"
        "data: {num_workers: 0}\n",
        encoding="utf-8",
    )
    words = [str(image_set), str(tmp_path / "runs"), "--config", str(config), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["measure_learning", *words, "--seeds", "3", "4"])
    measure_learning.main()
    lines = capsys.readouterr().out.splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{")]
    assert [record["seed"] for record in records] == [3, 4]
    # Brightness alone tells the classes apart, so raw pixels must be right.
    assert all(record["knn_raw_pixels"] == 100.0 for record in records)
    assert all(0 <= record["knn_trained"] <= 100 for record in records)
    assert lines[-1].startswith("| set | 2 | 100.0 |")
    assert (tmp_path / "runs" / "seed-4" / "teacher.safetensors").is_file()
