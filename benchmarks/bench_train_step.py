"""Whole training steps against the eager reference, in fresh processes.

A small setting by default; `--full` takes ViT-S and ViT-B, fp32 and bf16, K 8192 and 65536. One
setting at a time is `dinov2-fast bench step`.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import pytest
import torch

from dinov2_fast.bench.setting import StepSetting
from dinov2_fast.bench.step import compare_steps

SMALL = {"arch": "vits14", "prototypes": 8192, "batch_size": 1, "steps": 1}
LARGE = [
    {"arch": arch, "prototypes": prototypes, "dtype": dtype}
    for arch, dtype, prototypes in itertools.product(
        ("vits14", "vitb14"), ("fp32", "bf16"), (8192, 65536)
    )
]
SETTINGS = [
    pytest.param(SMALL, 1, id="short"),
    *(
        pytest.param(each, 3, id="-".join(map(str, each.values())), marks=pytest.mark.full)
        for each in LARGE
    ),
]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("setting", "rounds"), SETTINGS)
def test_train_step(
    benchmark: Any, setting: dict[str, Any], rounds: int, device: Literal["cpu", "cuda"]
):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    run = lambda: compare_steps(StepSetting(device=device, **setting), rounds=rounds)  # noqa: E731
    if benchmark.disabled:
        benchmark(lambda: StepSetting(device=device, **setting).checked().batch())
        return
    benchmark.extra_info.update(benchmark.pedantic(run, rounds=1))
