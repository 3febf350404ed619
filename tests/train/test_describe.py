from __future__ import annotations

import time

import pytest
import torch

from dinov2_fast import native
from dinov2_fast.config import load_config
from dinov2_fast.train.describe import why_slow
from dinov2_fast.train.trainer import describe


def rows_of(text: str) -> dict[str, str]:
    rows = (line.partition("  ") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in rows}


def test_the_official_vit_s_is_described_with_its_known_numbers():
    rows = rows_of(describe(load_config("vits14"), num_processes=16))
    # 224 px: 16 x 16 positions instead of the published 37 x 37.
    backbone = 22_056_576 - (37**2 - 16**2) * 384
    head = (384 + 1) * 2048 + (2048 + 1) * 2048 + (2048 + 1) * 256 + 65536 * (256 + 1)
    assert rows["parameters of backbone"] == f"{backbone:,}"
    assert rows["parameters of dino_head"] == f"{head:,}"
    assert rows["steps"] == "125,000 (100 official epochs)"
    assert rows["warm-up steps"] == "12,500"
    assert rows["global batch"] == "1,024 (64 x 16 processes)"
    assert rows["peak learning rate"] == "0.004"
    assert rows["images per official epoch"] == "1,280,000"
    # Student, gradients, two moments and teacher, 4 bytes each.
    assert f"({20 * (backbone + head):,} bytes)" in rows["fixed state per process"]


def test_the_largest_network_is_described_within_seconds_and_without_its_weights():
    begin = time.monotonic()
    rows = rows_of(describe(load_config("vitg14")))
    assert rows["parameters of backbone"].startswith("1,13")
    assert time.monotonic() - begin < 20  # drawing 1.1 billion weights twice takes minutes


def test_the_description_holds_the_resolved_settings():
    text = describe(load_config("debug", {"run.seed": 17}))
    assert "\n  seed: 17\n" in text
    assert "\n  num_local: 4\n" in text


@pytest.mark.parametrize(
    ("where", "chosen", "expected"),
    [
        ("cpu", {}, "slow: every operation takes its PyTorch reference"),
        ("cpu", {"DINOV2_FAST_BACKEND": "reference"}, ""),
        ("cpu", {"DINOV2_FAST_PREFER": "reference"}, ""),
        ("cuda", {}, ""),
    ],
)
def test_a_run_without_the_extension_says_that_it_is_slow(monkeypatch, where, chosen, expected):
    for name in ("DINOV2_FAST_BACKEND", "DINOV2_FAST_PREFER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(native, "why_not", lambda: "it is not built; run `pip install .`")
    said = why_slow(torch.device(where))
    assert said.startswith(expected)
    assert ("it is not built; run `pip install .`" in said) == bool(expected)
    monkeypatch.setattr(native, "why_not", lambda: "")
    assert not why_slow(torch.device(where))
