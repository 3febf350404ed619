"""What changes from step to step, as pure functions of the step.

Source: DINOv2 training code (behaviour of its cosine scheduler, and its default configuration).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dinov2_fast.config import OptimizerConfig, ScheduleConfig


@dataclass(frozen=True)
class StepValues:
    """The values one training step runs with."""

    lr: float
    """Learning rate before the multipliers of a parameter group."""
    weight_decay: float
    """Decoupled weight decay of the groups that decay."""
    momentum: float
    """EMA momentum of the teacher."""
    teacher_temperature: float
    """Temperature of the teacher's scores, both terms."""
    last_layer_lr_factor: float
    """Factor on `lr` for the prototypes: 0 while they are frozen, then 1."""


def steps_of_ratio(ratio: float, total_steps: int) -> int:
    """A share of the run in whole steps, halves rounded up.

    Args:
        ratio: share of the run, in [0, 1].
        total_steps: steps of the run.
    Returns:
        Steps; 0.16 of 625,000 is exactly 100,000 whatever the binary value of 0.16.
    """
    return math.floor(ratio * total_steps + 0.5)


def scaled_lr(optimizer: OptimizerConfig, *, global_batch_size: int) -> float:
    """Peak learning rate for a global batch.

    Args:
        optimizer: base rate and scaling rule.
        global_batch_size: images per optimizer step over all processes.
    Returns:
        The peak learning rate; 2e-4 becomes 3.46e-4 at 3072 under sqrt_wrt_1024.
    """
    if optimizer.lr_scaling == "sqrt_wrt_1024":
        return optimizer.base_lr * math.sqrt(global_batch_size / 1024)
    if optimizer.lr_scaling == "linear_wrt_256":
        return optimizer.base_lr * global_batch_size / 256
    return optimizer.base_lr


@dataclass(frozen=True)
class Schedules:
    """Every schedule of a run; two equal configurations give equal values at every step.

    Args:
        schedule: shapes of the curves as shares of the run.
        optimizer: base learning rate, its scaling rule and its final value.
        global_batch_size: images per optimizer step over all processes.
    """

    schedule: ScheduleConfig
    optimizer: OptimizerConfig
    global_batch_size: int

    @property
    def warmup_steps(self) -> int:
        """Steps with linearly growing learning rate, its first (0) and last (peak) included."""
        return steps_of_ratio(self.schedule.warmup_ratio, self.schedule.total_steps)

    @property
    def teacher_temperature_warmup_steps(self) -> int:
        """Steps with linearly growing teacher temperature, both ends included."""
        ratio = self.schedule.teacher_temperature_warmup_ratio
        return steps_of_ratio(ratio, self.schedule.total_steps)

    @property
    def frozen_last_layer_steps(self) -> int:
        """Steps during which the prototypes do not move."""
        return steps_of_ratio(self.schedule.freeze_last_layer_ratio, self.schedule.total_steps)

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up."""
        return scaled_lr(self.optimizer, global_batch_size=self.global_batch_size)

    def at(self, step: int) -> StepValues:
        """Values of one step.

        Args:
            step: number of the step, counted from 0; beyond the run every value is the final one.
        Returns:
            The values; the same at every call.
        """
        schedule, total = self.schedule, self.schedule.total_steps
        temperature_steps = self.teacher_temperature_warmup_steps
        start, end = schedule.teacher_temperature_start, schedule.teacher_temperature_end
        temperature = end
        if step < temperature_steps:
            temperature = _linear(step, start, end, num_steps=temperature_steps)
        return StepValues(
            lr=_warmup_cosine(
                step,
                self.peak_lr,
                self.optimizer.min_lr,
                warmup_steps=self.warmup_steps,
                total_steps=total,
            ),
            weight_decay=_warmup_cosine(
                step, schedule.weight_decay_start, schedule.weight_decay_end, total_steps=total
            ),
            momentum=_warmup_cosine(
                step, schedule.momentum_start, schedule.momentum_end, total_steps=total
            ),
            teacher_temperature=temperature,
            last_layer_lr_factor=0.0 if step < self.frozen_last_layer_steps else 1.0,
        )


def _linear(step: int, start: float, end: float, *, num_steps: int) -> float:
    """Value `step` of `num_steps` equally spaced ones, both ends included."""
    if num_steps > 1 and step == num_steps - 1:
        return end
    return start + step * ((end - start) / max(num_steps - 1, 1))


def _warmup_cosine(
    step: int, start: float, final: float, *, total_steps: int, warmup_steps: int = 0
) -> float:
    """Linear from 0 to `start`, then half a cosine that would reach `final` at `total_steps`.

    The cosine begins at `start` again, so with a warm-up the peak is used twice.
    """
    if step >= total_steps:
        return final
    if step < warmup_steps:
        return _linear(step, 0.0, start, num_steps=warmup_steps)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (start - final) * (1 + math.cos(math.pi * progress))
