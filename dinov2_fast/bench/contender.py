"""One contender of a step, measured in the process that runs this file.

`python -m dinov2_fast.bench.contender NAME MEASURE SETTING` prints one JSON object. `bench.step`
starts it anew for every measurement, so that no contender finds warm caches or freed memory.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.bench.eager.step import EagerStep
from dinov2_fast.bench.machine import synchronize
from dinov2_fast.bench.setting import FORGET_PEAK, StepSetting
from dinov2_fast.config import OptimizerConfig, ScheduleConfig
from dinov2_fast.data.collate import Batch
from dinov2_fast.train.memory import reuse_freed_memory
from dinov2_fast.train.optimizer import PretrainingOptimizer, build_optimizer
from dinov2_fast.train.schedules import Schedules, StepValues
from dinov2_fast.train.student_teacher import (
    StudentTeacher,
    build_student_teacher,
    student_losses,
    teacher_targets,
)

_PROFILED = 20  # operators of a profile
_MIDDLE = 60_000  # a step of the schedule at which nothing is frozen or warming up


class FastStep:
    """The package's own step.

    Args:
        setting: what is computed.
        optimizer: AdamW's constants.
    """

    def __init__(self, setting: StepSetting, optimizer: OptimizerConfig) -> None:
        self.pair: StudentTeacher = build_student_teacher(
            *setting.configs(),
            recipe="official",
            seed=0,
            device=setting.device,
            precision=setting.dtype,
        )
        self.optimizer: PretrainingOptimizer = build_optimizer(
            self.pair, optimizer, global_batch_size=setting.batch_size
        )
        self._num_steps = 0

    def losses(self, batch: Batch, *, teacher_temperature: float) -> dict[str, Tensor]:
        """Forward passes of both networks."""
        targets = teacher_targets(self.pair, batch, temperature=teacher_temperature)
        generator = torch.Generator().manual_seed(self._num_steps)
        return student_losses(self.pair, batch, targets, generator=generator)

    def __call__(self, batch: Batch, values: StepValues) -> dict[str, Tensor]:
        """One step as the trainer takes it."""
        losses = self.losses(batch, teacher_temperature=values.teacher_temperature)
        self.optimizer.zero_gradients()
        losses["total"].backward()
        self.optimizer.step(values)
        self._num_steps += 1
        return {name: value.detach() for name, value in losses.items()}


def build(name: str, setting: StepSetting) -> FastStep | EagerStep:
    """A contender with its networks on the setting's device.

    Args:
        name: `fast`, or a name that begins with `reference`.
        setting: what is computed.
    """
    optimizer = OptimizerConfig()
    if name == "fast":
        return FastStep(setting, optimizer)
    model, loss, crops = setting.configs()
    return EagerStep(model, loss, crops, optimizer, precision=setting.dtype, device=setting.device)


def measure_step(name: str, setting: StepSetting) -> dict[str, float]:
    """Median seconds of a step, and memory at its peak beyond that of the idle process.

    Args:
        name: the contender.
        setting: what is computed.
    """
    if name == "fast" and setting.device == "cpu":
        reuse_freed_memory()  # as the command line does
    batch = setting.batch()
    base = _reset_peak(setting.device)
    step = build(name, setting)
    values = _values(setting)
    seconds: list[float] = []
    for _ in range(1 + setting.steps):
        begin = time.perf_counter()
        step(batch, values)
        synchronize(setting.device)
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": statistics.median(seconds[1:]),
        "peak_mib": _peak_mib(setting.device) - base,
    }


def measure_saved_bytes(name: str, setting: StepSetting) -> dict[str, float]:
    """MiB that the student's forward pass and losses keep for the backward pass.

    Storages count once and whole; parameters do not count.

    Args:
        name: the contender.
        setting: what is computed.
    """
    step = build(name, setting)
    networks = step.pair if isinstance(step, FastStep) else step.student
    known = {p.untyped_storage().data_ptr() for p in networks.parameters()}
    batch = setting.batch()
    kept: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        losses = step.losses(batch, teacher_temperature=_values(setting).teacher_temperature)
    assert losses["total"].requires_grad  # the graph holds what is counted
    storages = [saved.tensor.untyped_storage() for saved in kept]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return {"saved_mib": sum(size for at, size in sizes.items() if at not in known) / 2**20}


def measure_profile(name: str, setting: StepSetting) -> dict[str, float]:
    """Share of the profiled CPU time of one step that each operator takes itself, largest first.

    Args:
        name: the contender.
        setting: what is computed; on a GPU these are shares of the host's time.
    """
    if name == "fast" and setting.device == "cpu":
        reuse_freed_memory()
    batch, step, values = setting.batch(), build(name, setting), _values(setting)
    step(batch, values)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(batch, values)
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(spent.values())
    largest = sorted(spent, key=lambda key: -spent[key])[:_PROFILED]
    return {key: round(spent[key] / total, 4) for key in largest}


class _Saved:
    """A tensor in a graph; gone once nothing will differentiate through it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _values(setting: StepSetting) -> StepValues:
    schedules = Schedules(ScheduleConfig(), OptimizerConfig(), setting.batch_size)
    return schedules.at(_MIDDLE)


def _reset_peak(device: str) -> float:
    """Forget earlier peaks; MiB in use now."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    FORGET_PEAK.write_text("5")  # VmHWM starts again at VmRSS
    return _status_mib("VmRSS")


def _peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _status_mib("VmHWM")


def _status_mib(key: str) -> float:
    lines = FORGET_PEAK.with_name("status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**10


def main(arguments: list[str]) -> None:
    """Measure as the three words say and print the result."""
    name, measure, setting = arguments[0], arguments[1], StepSetting(**json.loads(arguments[2]))
    torch.set_num_threads(setting.threads)
    measures: dict[str, Callable[[str, StepSetting], dict[str, Any]]] = {
        "step": measure_step,
        "saved_bytes": measure_saved_bytes,
        "profile": measure_profile,
    }
    print(json.dumps(measures[measure](name, setting)))


if __name__ == "__main__":
    main(sys.argv[1:])
