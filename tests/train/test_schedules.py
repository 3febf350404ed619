"""Schedules: step counts of the presets, curves against arrays written out independently."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinov2_fast.config import OptimizerConfig, ScheduleConfig, load_config
from dinov2_fast.train.schedules import Schedules, StepValues, scaled_lr, steps_of_ratio

# A short run whose phases all have an odd length; 0.16 and 0.24 of 25 steps are 4 and 6.
SHORT = ScheduleConfig(
    total_steps=25,
    warmup_ratio=0.16,
    weight_decay_start=0.04,
    weight_decay_end=0.2,
    momentum_start=0.994,
    momentum_end=1.0,
    teacher_temperature_start=0.04,
    teacher_temperature_end=0.07,
    teacher_temperature_warmup_ratio=0.24,
    freeze_last_layer_ratio=0.12,
)
OPTIMIZER = OptimizerConfig(base_lr=2e-4, min_lr=1e-6)


def values(schedule: ScheduleConfig, num_steps: int, field: str) -> np.ndarray:
    schedules = Schedules(schedule, OPTIMIZER, global_batch_size=3072)
    return np.array([getattr(schedules.at(step), field) for step in range(num_steps)])


def cosine(start: float, end: float, num_steps: int) -> np.ndarray:
    angles = np.pi * np.arange(num_steps) / num_steps
    return end + 0.5 * (start - end) * (1 + np.cos(angles))


def assert_equal_to_rounding(found: np.ndarray, expected: np.ndarray) -> None:
    # Two float64 formulas of a handful of operations on values of the size of `expected`.
    bound = 8 * np.finfo(np.float64).eps * np.abs(expected).max()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= bound


@pytest.mark.parametrize(
    ("preset", "counts"),
    [
        ("vits14", (125_000, 12_500, 37_500, 1_250)),
        ("vitb14", (125_000, 12_500, 37_500, 1_250)),
        ("vitl14", (625_000, 100_000, 37_500, 1_250)),
        ("vitg14", (625_000, 100_000, 37_500, 1_250)),
    ],
)
def test_presets_have_the_official_step_counts(preset, counts):
    config = load_config(preset)
    schedules = Schedules(config.schedule, config.optimizer, config.run.batch_size)
    assert counts == (
        config.schedule.total_steps,
        schedules.warmup_steps,
        schedules.teacher_temperature_warmup_steps,
        schedules.frozen_last_layer_steps,
    )


def test_learning_rate_warms_up_with_both_ends_and_uses_its_peak_twice():
    peak = 2e-4 * math.sqrt(3)
    found = values(SHORT, 25, "lr")
    expected = np.concatenate([np.linspace(0, peak, 4), cosine(peak, 1e-6, 21)])
    assert_equal_to_rounding(found, expected)
    assert found[0] == 0
    assert found[3] == found[4] == peak
    assert np.all(np.diff(found[4:]) < 0)
    assert found[-1] > 1e-6


def test_weight_decay_and_momentum_are_cosines_without_warmup():
    assert_equal_to_rounding(values(SHORT, 25, "weight_decay"), cosine(0.04, 0.2, 25))
    assert_equal_to_rounding(values(SHORT, 25, "momentum"), cosine(0.994, 1.0, 25))


def test_teacher_temperature_is_linear_with_both_ends_then_constant():
    expected = np.concatenate([np.linspace(0.04, 0.07, 6), np.full(19, 0.07)])
    assert_equal_to_rounding(values(SHORT, 25, "teacher_temperature"), expected)


def test_last_layer_is_frozen_for_its_first_steps_only():
    expected = np.concatenate([np.zeros(3), np.ones(22)])
    assert np.array_equal(values(SHORT, 25, "last_layer_lr_factor"), expected)


@pytest.mark.parametrize("step", [25, 26, 10_000])
def test_beyond_the_run_every_value_is_the_final_one(step):
    found = Schedules(SHORT, OPTIMIZER, global_batch_size=3072).at(step)
    assert found == StepValues(
        lr=1e-6,
        weight_decay=0.2,
        momentum=1.0,
        teacher_temperature=0.07,
        last_layer_lr_factor=1.0,
    )


@pytest.mark.parametrize(
    ("rule", "batch_size", "expected"),
    [
        ("sqrt_wrt_1024", 1024, 2e-4),
        ("sqrt_wrt_1024", 4096, 4e-4),
        ("sqrt_wrt_1024", 3072, 3.4641016151377544e-4),
        ("linear_wrt_256", 1024, 8e-4),
        ("none", 4096, 2e-4),
    ],
)
def test_peak_learning_rate_grows_with_the_batch_by_its_rule(rule, batch_size, expected):
    config = OptimizerConfig(base_lr=2e-4, lr_scaling=rule)
    found = scaled_lr(config, global_batch_size=batch_size)
    assert math.isclose(found, expected, rel_tol=4 * np.finfo(np.float64).eps)
    schedules = Schedules(SHORT, config, global_batch_size=batch_size)
    assert schedules.at(schedules.warmup_steps).lr == found


def test_minimum_learning_rate_is_not_scaled_with_the_batch():
    assert Schedules(SHORT, OPTIMIZER, global_batch_size=4096).at(25).lr == OPTIMIZER.min_lr


@pytest.mark.parametrize(
    ("ratio", "total", "expected"),
    [(0.16, 625_000, 100_000), (0.0, 10, 0), (1.0, 7, 7), (0.01, 20, 0), (0.5, 5, 3)],
)
def test_ratios_become_whole_steps_with_halves_rounded_up(ratio, total, expected):
    assert steps_of_ratio(ratio, total) == expected


@given(
    total_steps=st.integers(1, 300),
    warmup_ratio=st.floats(0, 1),
    temperature_ratio=st.floats(0, 1),
    step=st.integers(0, 400),
)
def test_every_value_stays_between_its_ends(total_steps, warmup_ratio, temperature_ratio, step):
    schedule = ScheduleConfig(
        total_steps=total_steps,
        warmup_ratio=warmup_ratio,
        teacher_temperature_warmup_ratio=temperature_ratio,
    )
    schedules = Schedules(schedule, OptimizerConfig(), global_batch_size=1024)
    found = schedules.at(step)
    rounding = 4 * np.finfo(np.float64).eps  # of sums of values of at most 1
    assert 0 <= found.lr <= 4e-3 + rounding
    assert 0.04 - rounding <= found.weight_decay <= 0.4 + rounding
    assert 0.992 - rounding <= found.momentum <= 1
    assert 0.04 - rounding <= found.teacher_temperature <= 0.07 + rounding
    assert found == schedules.at(step)
