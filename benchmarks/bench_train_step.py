"""Whole training steps in fresh processes: the fast step, and the same step module by module.

`python -m benchmarks.bench_train_step --json` prints seconds and peak memory of both, interleaved;
pytest-benchmark collects a small setting of it. Modules under autograd with reference ops are what
the package computed before it had kernels: they pack sequences, skip dropped samples and run heads
on masked patches only, so their distance from an iBOT-style step is larger still.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import hardware
from dinov2_fast.config import (
    CropConfig,
    HeadConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from dinov2_fast.data.collate import Batch, index_masks
from dinov2_fast.train.memory import reuse_freed_memory
from dinov2_fast.train.optimizer import build_optimizer
from dinov2_fast.train.schedules import Schedules
from dinov2_fast.train.student_teacher import (
    build_student_teacher,
    student_losses,
    teacher_targets,
)

ROOT = Path(__file__).parent.parent
_OWN_COMMAND = (sys.executable, "-m", "benchmarks.bench_train_step")
CONTENDERS = {
    "modules": {"DINOV2_FAST_BLOCK": "plain", "DINOV2_FAST_BACKEND": "reference"},
    "fast": {},
}


def synthetic_batch(batch_size: int, *, seed: int = 0) -> Batch:
    """Noise crops, 2 x 224 and 8 x 98 pixels, half of the global ones masked by 10 to 50 %."""
    crops, masks = CropConfig(), MaskConfig()
    generator = torch.Generator().manual_seed(seed)
    patches = (crops.global_px // 14) ** 2
    chosen = torch.zeros(2 * batch_size, patches, dtype=torch.bool)
    masked = torch.linspace(masks.min_ratio, masks.max_ratio, batch_size)
    for crop, ratio in enumerate(masked.tolist()):
        count = int(patches * ratio)
        chosen[crop, torch.randperm(patches, generator=generator)[:count]] = True
    indices, weights, num_masked = index_masks(chosen, upper_bound=int(chosen.sum()))
    shapes = [
        (count * batch_size, 3, px, px)
        for count, px in ((2, crops.global_px), (crops.num_local, crops.local_px))
    ]
    global_crops, local_crops = (torch.randn(shape, generator=generator) for shape in shapes)
    return Batch(
        global_crops=global_crops,
        local_crops=local_crops,
        masks=chosen,
        mask_indices=indices,
        mask_weights=weights,
        num_masked=num_masked,
        step=0,
        sample_indices=torch.arange(batch_size),
    )


def measure_here(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step and growth of the peak resident memory, in this process."""
    torch.set_num_threads(options.threads)
    if options.contender == "fast":
        reuse_freed_memory()  # as the command line does
    batch = synthetic_batch(options.batch_size)
    base = _peak_mib()
    head = HeadConfig(num_prototypes=options.prototypes)
    pair = build_student_teacher(
        ModelConfig(arch=options.arch, drop_ratio=options.drop_ratio),
        LossConfig(centering="softmax_centering", dino_head=head, ibot_head=head),
        CropConfig(),
        recipe="official",
        seed=0,
        device="cpu",
        precision=options.dtype,
    )
    config = OptimizerConfig()
    optimizer = build_optimizer(pair, config, global_batch_size=options.batch_size)
    values = Schedules(ScheduleConfig(), config, options.batch_size).at(10_000)
    seconds: list[float] = []
    for step in range(1 + options.steps):
        begin = time.perf_counter()
        targets = teacher_targets(pair, batch, temperature=values.teacher_temperature)
        generator = torch.Generator().manual_seed(step)
        losses = student_losses(pair, batch, targets, generator=generator)
        optimizer.zero_gradients()
        losses["total"].backward()
        optimizer.step(values)
        del targets, losses
        seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds[1:]), "peak_mib": _peak_mib() - base}


def compare(arguments: list[str], *, rounds: int) -> dict[str, Any]:
    """Both contenders, interleaved in fresh processes: medians, spreads and ratios."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, extra in CONTENDERS.items():
            finished = subprocess.run(
                [*_OWN_COMMAND, "--contender", name, *arguments],
                cwd=ROOT,
                env={**os.environ, **extra},
                check=True,
                capture_output=True,
                text=True,
            )
            rows[name].append(json.loads(finished.stdout))
    found: dict[str, Any] = {}
    for unit in ("seconds", "peak_mib"):
        measured = {name: [row[unit] for row in each] for name, each in rows.items()}
        found[unit] = {name: statistics.median(each) for name, each in measured.items()}
        found[f"{unit}_range"] = {name: [min(e), max(e)] for name, e in measured.items()}
        found[f"{unit}_ratio"] = found[unit]["modules"] / found[unit]["fast"]
    return found


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@pytest.mark.timeout(600)
def test_train_step(benchmark: Any):
    arguments = ["--arch", "vits14", "--prototypes", "8192", "--batch-size", "2"]
    found = benchmark.pedantic(lambda: compare(arguments, rounds=1), rounds=1)
    benchmark.extra_info.update(found, op="train_step", shape=arguments, **hardware("cpu"))


def main() -> None:
    """Compare, or with --contender measure one of the two in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="vits14")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--batch-size", type=int, default=5)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--drop-ratio", type=float, default=0.4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each contender")
    parser.add_argument("--contender", choices=tuple(CONTENDERS))
    parser.add_argument("--json", action="store_true", help="one line instead of an indented one")
    options = parser.parse_args()
    if options.contender is not None:
        print(json.dumps(measure_here(options)))
        return
    arguments = [word for word in sys.argv[1:] if word != "--json"]
    found = {**compare(arguments, rounds=options.rounds), "arguments": arguments}
    facts = {**hardware("cpu"), "threads": options.threads}
    print(json.dumps({**found, **facts}, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
