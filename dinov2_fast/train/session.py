"""The parts of one run and what becomes of them over its life: built, saved, resumed, finished."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from dinov2_fast import __version__
from dinov2_fast.config import Config, to_dict, to_yaml
from dinov2_fast.data.image_source import ImageSource
from dinov2_fast.distributed import broadcast
from dinov2_fast.errors import CheckpointError, OutputError
from dinov2_fast.models.pretrained import backbone_metadata
from dinov2_fast.train.checkpoint import (
    Checkpoint,
    config_hash,
    differing_keys,
    list_checkpoints,
    load_newest,
    save_checkpoint,
    sweep,
)
from dinov2_fast.train.describe import count_parameters
from dinov2_fast.train.metrics import Meter, read_metrics, truncate_metrics
from dinov2_fast.train.nonfinite import NonfiniteGuard
from dinov2_fast.train.optimizer import PretrainingOptimizer, build_optimizer
from dinov2_fast.train.parallel import Place, distribute
from dinov2_fast.train.progress import Progress
from dinov2_fast.train.run_directory import RunDirectory, output_errors, write_atomic
from dinov2_fast.train.schedules import Schedules
from dinov2_fast.train.student_teacher import (
    StudentTeacher,
    build_student_teacher,
    teacher_state_official,
)
from dinov2_fast.train.tensor_file import replace_tensors

_NAMES_IN_FINGERPRINT = 1024
_CHANGES_LISTED = 8
_FINAL_VALUES = ("loss", "dino", "ibot", "koleo", "teacher_entropy", "target_mean_kl")


@dataclass
class Session:
    """Everything that a run consists of; only `step` and what it holds change.

    Args:
        step: finished optimizer steps.
        data_identity: number of images and a fingerprint of their names.
    """

    config: Config
    place: Place
    files: RunDirectory
    pair: StudentTeacher
    optimizer: PretrainingOptimizer
    schedules: Schedules
    guard: NonfiniteGuard
    meter: Meter
    progress: Progress
    data_identity: dict[str, Any]
    step: int = 0

    @property
    def global_batch_size(self) -> int:
        """Images per step over all processes."""
        return self.config.run.batch_size * self.place.world_size


def open_session(
    config: Config, place: Place, files: RunDirectory, progress: Progress, source: ImageSource
) -> Session:
    """Networks with fresh weights and everything around them, at step 0.

    Args:
        config: the run.
        place: this process.
        files: where rank 0 writes.
        progress: what the user sees.
        source: the images.
    """
    assert config.run.precision != "auto"  # `with_precision` decided
    pair = build_student_teacher(
        config.model,
        config.loss,
        config.crops,
        recipe=config.recipe,
        seed=config.run.seed,
        device=place.device,
        precision=config.run.precision,
    )
    global_batch = config.run.batch_size * place.world_size
    session = Session(
        config=config,
        place=place,
        files=files,
        pair=pair,
        optimizer=build_optimizer(pair, config.optimizer, global_batch_size=global_batch),
        schedules=Schedules(config.schedule, config.optimizer, global_batch),
        guard=NonfiniteGuard(
            files.nonfinite,
            place,
            max_in_a_row=config.run.max_nonfinite_steps,
            tell=progress.message,
        ),
        meter=Meter(global_batch),
        progress=progress,
        data_identity=data_identity(source, config.data.path),
    )
    pair.wrap_student(lambda student: distribute(student, place))
    return session


def save_session(session: Session) -> None:
    """Write a checkpoint; every process must call it.

    Raises:
        OutputError: the disk is full or not writable; the previous checkpoint stays.
        NumericsError: the last step was one broken step too many.
    """
    session.guard.settle()
    session.place.on_main(lambda: _save(session))


def resume_session(session: Session, *, resume: bool = True) -> None:
    """Go on from the newest good checkpoint, if there is one; every process must call it.

    Args:
        session: fresh; its networks, moments and counters are overwritten.
        resume: False refuses a directory that holds a run already.
    Raises:
        CheckpointError: no checkpoint verifies, or it was written with other settings.
        OutputError: the directory holds a run that must not be resumed.
    """
    place = session.place
    counters = place.on_main(lambda: _load(session, resume=resume))
    place.on_main(lambda: _prepare_files(session, step=counters["step"] if counters else 0))
    if counters is None:
        return
    for part in (session.pair, session.optimizer):
        # Loaded on every process, since not every entry of a state need be the live tensor.
        state = {name: value.to(place.device) for name, value in part.state_dict().items()}
        part.load_state_dict({name: broadcast(value) for name, value in state.items()})
    session.step = counters["step"]
    session.meter = Meter(session.global_batch_size, earlier_seconds=counters["seconds"])
    session.guard.load_state_dict(counters["nonfinite"])
    note = f"resumed at step {session.step} of {session.config.schedule.total_steps}"
    if counters["world_size"] != place.world_size:
        note += (
            f", on {place.world_size} processes instead of {counters['world_size']}: the same "
            "images in the same order, but masks and sums differ"
        )
    session.progress.message(note)


def finish_session(session: Session) -> dict[str, Any]:
    """Write `teacher.safetensors` and `summary.json`; every process must call it.

    Returns:
        The summary.
    """
    return session.place.on_main(lambda: _finish(session))


def finished_summary(files: RunDirectory, config: Config, place: Place) -> dict[str, Any] | None:
    """The summary of a run that ended in this directory; None if there is none to respect.

    Raises:
        CheckpointError: a run with other settings ended here.
    """
    summary = files.read_summary()
    if summary is None or not summary.get("finished") or not files.teacher.exists():
        return None
    global_batch = config.run.batch_size * place.world_size
    same_batch = summary.get("global_batch_size") == global_batch
    if summary.get("config_sha256") == config_hash(to_dict(config)) and same_batch:
        return summary
    changes = []
    with contextlib.suppress(OSError, ValueError, AttributeError, yaml.YAMLError):
        former = yaml.safe_load(files.config.read_text(encoding="utf-8"))
        changes = differing_keys(former, to_dict(config))
    if not same_batch:
        changes.insert(0, f"global batch: {summary.get('global_batch_size')} -> {global_batch}")
    raise CheckpointError(
        f"checkpoint: {files.root} holds a finished run with other settings"
        f"{_listed(changes)}; choose another --out"
    )


def data_identity(source: ImageSource, path: str) -> dict[str, Any]:
    """What makes two data sets the same one for resuming: their size and the names inside them.

    Args:
        source: the images.
        path: the setting they were opened with; where the set lies does not count.
    """
    count = len(source)
    digest = hashlib.sha256()
    for part in range(min(count, _NAMES_IN_FINGERPRINT)):
        name = source.name(part * count // min(count, _NAMES_IN_FINGERPRINT))
        for prefix in (os.path.abspath(path), os.path.dirname(os.path.abspath(path))):
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                break
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return {"num_images": count, "names_sha256": digest.hexdigest()}


def _save(session: Session) -> None:
    config = to_dict(session.config)
    counters = {
        "config": config,
        "data": session.data_identity,
        "global_batch_size": session.global_batch_size,
        "nonfinite": session.guard.state_dict(),
        "seconds": session.meter.seconds,
        "step": session.step,
        "world_size": session.place.world_size,
    }
    state = {name: child.state_dict() for name, child in session.pair.named_children()}
    facts = {
        "config_sha256": config_hash(config),
        "global_batch_size": session.global_batch_size,
        "seed": session.config.run.seed,
        "versions": _versions(),
        "world_size": session.place.world_size,
    }
    save_checkpoint(
        session.files.checkpoints,
        {**state, "optimizer": session.optimizer.state_dict(), "run": counters},
        step=session.step,
        facts=facts,
        keep=session.config.run.keep_checkpoints,
        metadata=backbone_metadata(session.pair.teacher.backbone),
    )


def _load(session: Session, *, resume: bool) -> dict[str, Any] | None:
    """Networks and moments of rank 0 from the newest checkpoint; its counters."""
    folder = session.files.checkpoints
    if not resume and list_checkpoints(folder):
        raise OutputError(f"output: {session.files.root} holds a run already; choose another --out")
    with output_errors(folder):
        sweep(folder)
    checkpoint = load_newest(folder, warn=session.progress.message)
    if checkpoint is None:
        return None
    try:
        _check_fit(checkpoint, session)
        for name, child in session.pair.named_children():
            child.load_state_dict(checkpoint.state[name])
        session.optimizer.load_state_dict(checkpoint.state["optimizer"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint: {checkpoint.path} does not fit these networks: {error}"
        ) from error
    return checkpoint.state["run"]


def _check_fit(checkpoint: Checkpoint, session: Session) -> None:
    """Refuse to go on with settings or images that would make it another run."""
    former = checkpoint.state["run"]
    changes = differing_keys(former["config"], to_dict(session.config))
    if former["global_batch_size"] != session.global_batch_size:
        changes.append(
            f"global batch (run.batch_size x processes): {former['global_batch_size']} -> "
            f"{session.global_batch_size}"
        )
    if former["data"] != session.data_identity:
        old, new = former["data"]["num_images"], session.data_identity["num_images"]
        changes.append(f"images at data.path: {old} -> {new if new != old else 'other names'}")
    if changes:
        raise CheckpointError(
            f"checkpoint: {checkpoint.path} was written with other settings{_listed(changes)}; "
            "restore them, or choose another --out for a new run"
        )


def _prepare_files(session: Session, *, step: int) -> None:
    """Make the files of the run say what is true at this step."""
    files = session.files
    with output_errors(files.root):
        text = to_yaml(session.config)
        if not files.config.exists() or files.config.read_text(encoding="utf-8") != text:
            write_atomic(files.config, text)
        truncate_metrics(files.metrics, step)


def _finish(session: Session) -> dict[str, Any]:
    files, config = session.files, session.config
    backbone = session.pair.teacher.backbone
    records = read_metrics(files.metrics)
    last = records[-1] if records else {}
    images = session.step * session.global_batch_size
    seconds = session.meter.seconds
    summary = {
        "finished": True,
        "arch": config.model.arch,
        "recipe": config.recipe,
        "seed": config.run.seed,
        "steps": session.step,
        "images": images,
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 3),
        "final": {name: last[name] for name in _FINAL_VALUES if name in last},
        "parameters": {name: count_parameters(net) for name, net in session.pair.student.items()},
        "global_batch_size": session.global_batch_size,
        "world_size": session.place.world_size,
        "device": str(session.place.device),
        "num_images": session.data_identity["num_images"],
        "unreadable_images": _count_lines(files.quarantine),
        "nonfinite_steps": session.guard.total,
        "config_sha256": config_hash(to_dict(config)),
        "versions": _versions(),
    }
    with output_errors(files.root):
        state = teacher_state_official(session.pair)
        sha256, size = replace_tensors(files.teacher, state, backbone_metadata(backbone))
        # What `noted_of` compares the file with wherever weights are read.
        summary["files"] = {files.teacher.name: {"sha256": sha256, "size": size}}
        write_atomic(files.summary, json.dumps(summary, indent=1) + "\n")
    return summary


def _listed(changes: list[str]) -> str:
    """The first few changes, as the middle of a sentence."""
    if not changes:
        return ""
    rest = len(changes) - _CHANGES_LISTED
    return f": {'; '.join(changes[:_CHANGES_LISTED])}" + (f"; and {rest} more" if rest > 0 else "")


def _count_lines(path: Path) -> int:
    """Lines of a file; a missing one has none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _versions() -> dict[str, str]:
    return {"dinov2_fast": __version__, "torch": str(torch.__version__)}
