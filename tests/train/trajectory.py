"""Twenty training steps of a tiny ViT, reduced to the bits of its losses.

`python -m tests.train.trajectory --write` at the root of the project stores the list anew; only a
change that is meant to alter numbers may do so. Without `--write` it prints the list.

Libraries pick their inner loops by the CPU, and those differ in the last bits. So the steps run in
a process of their own, on one thread, held to code that every x86-64 CPU with AVX computes alike:
MKL's compatible branch, oneDNN's for SSE4.1, torch's without vectors. One function escapes: MKL's
square root rests on an approximate instruction whose bits are the vendor's, so numpy's takes its
place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import numpy
import torch
from torch import Tensor

from dinov2_fast.config import (
    CropConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from dinov2_fast.train.optimizer import build_optimizer
from dinov2_fast.train.schedules import Schedules
from dinov2_fast.train.student_teacher import (
    build_student_teacher,
    student_losses,
    teacher_targets,
)
from tests.train.batches import synthetic_batch

STORED = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).parents[2]
NUM_STEPS = 20
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    # The C library has variants of exp and log for CPUs with fused multiply-add.
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA,-FMA4",
    "DINOV2_FAST_BACKEND": "reference",
    "DINOV2_FAST_BLOCK": "plain",
}
# What the same steps are computed with by default: native kernels, blocks that own their memory.
FAST_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def measure(environment: Mapping[str, str] = ENVIRONMENT) -> list[str]:
    """Losses and gradient norms of every step as hexadecimal floats, from a new process."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.train.trajectory", "--inside"],
        cwd=ROOT,
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(finished.stdout)


def stored() -> list[str]:
    """The list that this version must reproduce."""
    return json.loads(STORED.read_text(encoding="utf-8"))


def run_steps() -> list[str]:
    """Train and describe each step in one line: its losses, then gradient norms."""
    num_calls = 0

    def exact_sqrt(x: Tensor, *, out: Tensor) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return out.copy_(torch.from_numpy(numpy.sqrt(x.numpy())))

    with mock.patch.object(torch, "sqrt", exact_sqrt):
        lines = _run_steps()
    pinned = os.environ.get("DINOV2_FAST_BACKEND") == "reference"
    assert num_calls > 0 or not pinned, "the optimizer no longer calls torch.sqrt: replace its call"
    return lines


def _run_steps() -> list[str]:
    torch.set_num_threads(1)
    batch_size = 3
    # SwiGLU, a register, untied heads, dropped samples, resized positions: as many rooms as fit.
    pair = build_student_teacher(
        ModelConfig(
            arch="debug", embed_dim=32, num_heads=2, ffn="swiglu", num_registers=1, drop_ratio=0.4
        ),
        LossConfig(
            separate_ibot_head=True,
            dino_head=HeadConfig(num_prototypes=32, hidden_dim=24, bottleneck_dim=12),
            ibot_head=HeadConfig(num_prototypes=24, hidden_dim=24, bottleneck_dim=8),
        ),
        CropConfig(global_px=42, local_px=28, num_local=3),
        recipe="official",
        seed=0,
        device="cpu",
    )
    config = OptimizerConfig(base_lr=2e-3, lr_scaling="none", clip_norm=0.5)
    schedule = ScheduleConfig(total_steps=NUM_STEPS, freeze_last_layer_ratio=0.1)
    schedules = Schedules(schedule, config, batch_size)
    optimizer = build_optimizer(pair, config, global_batch_size=batch_size)
    lines = []
    for step in range(NUM_STEPS):
        values = schedules.at(step)
        batch = synthetic_batch(step % 4, batch_size=batch_size)
        targets = teacher_targets(pair, batch, temperature=values.teacher_temperature)
        generator = torch.Generator().manual_seed(step)
        losses = student_losses(pair, batch, targets, generator=generator)
        optimizer.zero_gradients()
        losses["total"].backward()
        norms = optimizer.step(values)
        assert not norms.pop("skipped")
        numbers = [value.detach().item().hex() for value in (*losses.values(), *norms.values())]
        lines.append(" ".join(numbers))
    return lines


def main(arguments: list[str]) -> None:
    """Print the list, measured here or in a prepared process, or store it."""
    lines = run_steps() if arguments == ["--inside"] else measure()
    text = json.dumps(lines, indent=1) + "\n"
    if arguments == ["--write"]:
        STORED.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
