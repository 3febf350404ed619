"""One pretraining run, readable from top to bottom; numbers are those of docs/architecture.md."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from dinov2_fast.config import Config
from dinov2_fast.data.collate import Batch
from dinov2_fast.data.datasets import open_images
from dinov2_fast.data.image_source import ImageSource
from dinov2_fast.data.loader import StopRequested, TrainingLoader
from dinov2_fast.data.seeding import DROPPED_SAMPLES, derive_seed
from dinov2_fast.distributed import all_reduce_mean
from dinov2_fast.errors import ConfigError, UserError
from dinov2_fast.train.describe import count_parameters, describe, why_slow
from dinov2_fast.train.determinism import deterministic_algorithms
from dinov2_fast.train.interruption import STOP_ERRORS, Interruption
from dinov2_fast.train.metrics import memory_mib, target_statistics, to_floats
from dinov2_fast.train.parallel import Place, joined, peer_stopped
from dinov2_fast.train.precision import with_precision
from dinov2_fast.train.progress import Progress
from dinov2_fast.train.run_directory import RunDirectory, append_lines, output_errors
from dinov2_fast.train.schedules import StepValues
from dinov2_fast.train.session import (
    Session,
    finish_session,
    finished_summary,
    open_session,
    resume_session,
    save_session,
)
from dinov2_fast.train.student_teacher import Targets, student_losses, teacher_targets

__all__ = ["StepResult", "describe", "train", "train_step"]

OnLog = Callable[[dict[str, Any]], None]

# What processes tell each other before a step, besides 0 and the numbers of stop signals.
_FAILED = 1000


@dataclass(frozen=True)
class StepResult:
    """What one step leaves for the log, all of it still on the device."""

    values: StepValues
    """Learning rate and the like of the step."""
    targets: Targets
    """The teacher's targets."""
    losses: dict[str, Tensor]
    """`LOSS_NAMES` -> fp32 scalars, detached."""
    norms: dict[str, Tensor]
    """`gradient_norm_<sub-network>` before clipping."""
    skipped: Tensor
    """0-d bool: whether the step changed nothing, because of values that are not finite."""


def train(
    config: Config, out: Path, *, resume: bool = True, on_log: OnLog | None = None
) -> dict[str, Any]:
    """Pretrain a network, from the first step or from where the same command was stopped.

    Runs in one process, or in those that `torchrun` started; rank 0 writes and speaks.

    Args:
        config: the whole run.
        out: the run directory.
        resume: False refuses a directory that holds a run already.
        on_log: called on rank 0 with every record of `metrics.jsonl`.
    Returns:
        What `summary.json` holds; with `finished` false and no file after `run.stop_step`.
    Raises:
        UserError: the subclass says what happened, its `exit_code` what the process should return.
            After PreemptedError and StoppedByUserError a checkpoint is on disk.
    """
    with (
        joined(config.run.device, num_threads=config.run.num_threads) as place,
        deterministic_algorithms(place.device, enabled=config.run.deterministic),
        _owned(RunDirectory(out), place) as files,
        Interruption() as interruption,
    ):
        config = place.on_main(lambda: with_precision(config, files, place.device))
        total_steps = config.schedule.total_steps
        progress = Progress(
            total_steps, config.run.batch_size * place.world_size, visible=place.is_main
        )
        summary = place.on_main(lambda: finished_summary(files, config, place))
        if summary is not None:
            progress.message(f"{out} holds this run, finished at step {total_steps}; nothing to do")
            return summary
        source = open_images(config.data.path)
        session = open_session(config, place, files, progress, source)
        resume_session(session, resume=resume)
        stop_step = min(config.run.stop_step or total_steps, total_steps)
        if session.step < stop_step:
            progress.message(_announcement(session, source, stop_step=stop_step))
            if reason := why_slow(place.device):
                progress.message(reason)
            loader = _loader(session, source, stop_step, interruption)
            with progress, contextlib.closing(loader):
                _run_steps(session, iter(loader), stop_step, interruption, on_log)
        if session.step < total_steps:
            progress.message(f"stopped at step {session.step}, as run.stop_step says")
            return {"finished": False, "steps": session.step}
        summary = finish_session(session)
        if summary["unreadable_images"]:
            progress.message(
                f"{summary['unreadable_images']} unreadable images were replaced by others; "
                f"see {files.quarantine}"
            )
        progress.message(f"finished: {files.teacher}")
        return summary


def train_step(session: Session, batch: Batch) -> StepResult:
    """One optimizer step on one batch; nothing in it waits for the device.

    Args:
        session: the run; networks, moments and centres change, its `step` does not.
        batch: this process's part of the step, on the host.
    """
    pair, config = session.pair, session.config
    # 5  to the device; what this step runs with
    batch = batch.to(session.place.device)
    values = session.schedules.at(session.step)
    generator = torch.Generator()
    generator.manual_seed(
        derive_seed(config.run.seed, DROPPED_SAMPLES, session.step, session.place.rank)
    )
    # 6-7  teacher on the unmasked global crops; its scores become targets
    centers = [center.clone() for center in pair.centering.buffers()]
    targets = teacher_targets(pair, batch, temperature=values.teacher_temperature)
    # 8-12  student on all crops as one pack; heads and losses
    losses = student_losses(pair, batch, targets, generator=generator)
    # 13  gradients, clipping, AdamW; 14 the teacher follows in the same pass
    session.optimizer.zero_gradients()
    losses["total"].backward()
    losses = {name: value.detach() for name, value in losses.items()}
    broken = ~losses["total"].isfinite()
    outcome = session.optimizer.step(values, skip=broken)
    skipped = outcome.pop("skipped")
    for center, before in zip(pair.centering.buffers(), centers, strict=True):
        center.copy_(torch.where(skipped, before, center))
    return StepResult(values, targets, losses, outcome, skipped)


def _run_steps(
    session: Session,
    batches: Iterator[Batch],
    stop_step: int,
    interruption: Interruption,
    on_log: OnLog | None,
) -> None:
    """Steps up to `stop_step`, saving on the way, at the end and before leaving early."""
    run, place = session.config.run, session.place
    while session.step < stop_step:
        # 1-4  crops and masks, made by the loader's processes
        batch, error = _next_batch(session, batches, interruption)
        verdict = place.agree(_FAILED if error else interruption.signal_number)
        if verdict:
            _save_and_leave(session, verdict, error)
        assert batch is not None
        result = train_step(session, batch)
        session.step += 1
        session.meter.step_done()
        session.progress.step_done(session.step)
        # 14  metrics and checkpoint
        flags = {**result.losses, **result.norms}
        session.guard.watch(session.step, batch.sample_indices, flags, result.skipped)
        total_steps = session.config.schedule.total_steps
        if session.step in (1, total_steps) or session.step % run.log_every_steps == 0:
            _log(session, result, on_log)
        if session.step == stop_step or session.step % run.checkpoint_every_steps == 0:
            save_session(session)
        del result  # the targets' memory is free for the next step


def _announcement(session: Session, source: ImageSource, *, stop_step: int) -> str:
    return (
        f"{len(source):,} images; {count_parameters(session.pair.student):,} parameters; steps "
        f"{session.step + 1} to {stop_step} of {session.global_batch_size} images "
        f"on {session.place.world_size} x {session.place.device} in {session.config.run.precision}"
    )


def _loader(
    session: Session, source: ImageSource, stop_step: int, interruption: Interruption
) -> TrainingLoader:
    """Batches of this process from the session's step on."""
    config, place = session.config, session.place
    try:
        return TrainingLoader(
            source,
            crops=config.crops,
            masks=config.masks,
            patch_size=session.pair.student.backbone.patch_size,
            seed=config.run.seed,
            batch_size=config.run.batch_size,
            data=config.data,
            recipe=config.recipe,
            rank=place.rank,
            world_size=place.world_size,
            local_world_size=place.local_world_size,
            start_step=session.step,
            stop_step=stop_step,
            quarantine_path=session.files.quarantine,
            pin_memory=place.device.type == "cuda",
            stop_requested=lambda: interruption.signal_number != 0,
        )
    except ValueError as error:
        raise ConfigError(f"config: {error}") from error


def _next_batch(
    session: Session, batches: Iterator[Batch], interruption: Interruption
) -> tuple[Batch | None, UserError | None]:
    """The next batch, or the reason why this process has none."""
    if interruption.signal_number:
        return None, None
    try:
        with session.meter.waiting():
            batch = next(batches)
    except UserError as error:
        return None, error
    except StopRequested:
        return None, None
    return batch, None


def _save_and_leave(session: Session, verdict: int, error: UserError | None) -> NoReturn:
    """Save, then raise what ends this process; another process's error if it has none itself."""
    save_session(session)
    if verdict == _FAILED:
        failures = session.place.gather((str(error), error.exit_code) if error else None)
        raise error or peer_stopped(*next(failure for failure in failures if failure))
    raise STOP_ERRORS[verdict](
        f"stopped by {signal.Signals(verdict).name} at step {session.step}, which is saved; "
        "the same command goes on from there"
    )


def _log(session: Session, result: StepResult, on_log: OnLog | None) -> None:
    """One record of the step just made, averaged over the processes; waits for the device."""
    session.guard.settle()
    names = ["total", *(name for name in result.losses if name != "total")]
    means = all_reduce_mean(torch.stack([result.losses[name] for name in names]))
    losses = dict(zip(names, means, strict=True))
    targets = result.targets.dino or result.targets.ibot
    statistics = target_statistics(targets) if targets is not None else {}
    parts = {"loss": losses.pop("total"), "dino": losses["dino_global"] + losses["dino_local"]}
    record: dict[str, Any] = {
        "step": session.step,
        **to_floats({**parts, **losses, **result.norms, **statistics}),
        "lr": result.values.lr,
        "weight_decay": result.values.weight_decay,
        "momentum": result.values.momentum,
        "teacher_temperature": result.values.teacher_temperature,
        "nonfinite_steps": session.guard.total,
        **session.meter.read(),
        "memory_mib": memory_mib(session.place.device),
    }

    def write() -> None:
        with output_errors(session.files.metrics):
            append_lines(session.files.metrics, [record])

    session.place.on_main(write)
    session.progress.log(record)
    if on_log is not None and session.place.is_main:
        on_log(record)


@contextlib.contextmanager
def _owned(files: RunDirectory, place: Place) -> Iterator[RunDirectory]:
    """The run directory, locked by rank 0 for all processes."""
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(files.locked())

        place.on_main(lock)
        yield files
