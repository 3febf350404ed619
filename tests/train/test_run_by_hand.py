"""The trainer against the same run put together by hand out of its parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dinov2_fast.config import Config
from dinov2_fast.data.datasets import open_images
from dinov2_fast.data.loader import TrainingLoader
from dinov2_fast.data.seeding import DROPPED_SAMPLES, derive_seed
from dinov2_fast.models.pretrained import load_weights
from dinov2_fast.train.optimizer import build_optimizer
from dinov2_fast.train.schedules import Schedules, StepValues
from dinov2_fast.train.student_teacher import (
    build_student_teacher,
    student_losses,
    teacher_state_official,
    teacher_targets,
)
from dinov2_fast.train.trainer import train
from tests.train.runs import tiny_config, write_pictures

NUM_STEPS = 4
LOGGED = ("lr", "weight_decay", "momentum", "teacher_temperature")


def run_by_hand(
    config: Config,
) -> tuple[list[StepValues], list[dict[str, float]], dict[str, torch.Tensor]]:
    """Values and losses of the first steps, and the teacher after them."""
    source = open_images(config.data.path)
    loader = TrainingLoader(
        source,
        crops=config.crops,
        masks=config.masks,
        patch_size=14,
        seed=config.run.seed,
        batch_size=config.run.batch_size,
        data=config.data,
        recipe=config.recipe,
        stop_step=NUM_STEPS,
    )
    pair = build_student_teacher(
        config.model,
        config.loss,
        config.crops,
        recipe=config.recipe,
        seed=config.run.seed,
        device="cpu",
    )
    batch_size = config.run.batch_size
    optimizer = build_optimizer(pair, config.optimizer, global_batch_size=batch_size)
    schedules = Schedules(config.schedule, config.optimizer, batch_size)
    values, losses = [], []
    for step, batch in enumerate(loader):
        now = schedules.at(step)  # the first step is number 0 and has learning rate 0
        generator = torch.Generator().manual_seed(
            derive_seed(config.run.seed, DROPPED_SAMPLES, step, 0)
        )
        targets = teacher_targets(pair, batch, temperature=now.teacher_temperature)
        parts = student_losses(pair, batch, targets, generator=generator)
        optimizer.zero_gradients()
        parts["total"].backward()
        optimizer.step(now)
        values.append(now)
        losses.append({name: float(part.detach()) for name, part in parts.items()})
    return values, losses, teacher_state_official(pair)


def logged(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", ["official", "paper"])
def test_a_run_is_its_parts_with_the_schedules_from_step_0_on(tmp_path, recipe):
    # Half of the steps warm the rate and the temperature up, so that every step has its own values.
    config = tiny_config(
        write_pictures(tmp_path / "pictures"),
        recipe=recipe,
        schedule__total_steps=NUM_STEPS,
        schedule__warmup_ratio=0.5,
        schedule__teacher_temperature_warmup_ratio=0.75,
        schedule__freeze_last_layer_ratio=0.5,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(config.run.num_threads)
    try:
        values, losses, teacher = run_by_hand(config)
    finally:
        torch.set_num_threads(threads)
    train(config, tmp_path / "out")

    records = logged(tmp_path / "out")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record, expected, parts in zip(records, values, losses, strict=True):
        assert [record[name] for name in LOGGED] == [getattr(expected, name) for name in LOGGED]
        assert {name: record[name] for name in parts if name != "total"} == {
            name: part for name, part in parts.items() if name != "total"
        }
        assert record["loss"] == parts["total"]
    assert records[0]["lr"] == 0 < records[1]["lr"]
    written = load_weights(tmp_path / "out" / "teacher.safetensors")
    assert written.keys() == teacher.keys()
    assert [name for name in teacher if not torch.equal(teacher[name], written[name])] == []
