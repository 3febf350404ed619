"""Checkpoints that are whole or absent: written aside, hashed, made durable, then renamed.

`OUT/checkpoints/step-00001000/` holds `state.safetensors` (every tensor), `state.json` (the rest,
and where the tensors belong) and `MANIFEST.json` (size and SHA-256 of both, and of itself). Nothing
in it is a pickle, and nothing is opened before its hash agrees.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.errors import CheckpointError
from dinov2_fast.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    canonical_json,
    check_unchanged,
    read_manifest,
    require_plain,
    sealed,
)
from dinov2_fast.train.run_directory import output_errors, sync_folder
from dinov2_fast.train.tensor_file import write_tensors

_TENSORS_NAME, _STATE_NAME = "state.safetensors", "state.json"
_TEMPORARY_PREFIX = ".tmp-"
_FOLDER_NAME = re.compile(r"step-(\d{8,12})")

# Settings that change neither what is computed nor from which data.
HARMLESS_KEYS = frozenset(
    {
        "data.path",  # the images themselves are compared instead
        "data.num_workers",
        "data.prefetch_batches",
        "data.max_bad_ratio",
        "run.batch_size",  # the global batch size is compared instead
        "run.device",
        "run.num_threads",
        "run.log_every_steps",
        "run.checkpoint_every_steps",
        "run.keep_checkpoints",
        "run.max_nonfinite_steps",
        "run.stop_step",
    }
)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Args:
        path: the folder it came from.
        step: finished optimizer steps.
        manifest: what `MANIFEST.json` says.
        state: what was given to `save_checkpoint`; tensors are on the CPU.
    """

    path: Path
    step: int
    manifest: dict[str, Any]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    state: dict[str, Any],
    *,
    step: int,
    facts: dict[str, Any],
    keep: int,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write one checkpoint durably, then remove those that are no longer kept.

    A kill at any point, a full disk or a power cut leaves the previous checkpoint as it was.

    Args:
        folder: `OUT/checkpoints`; made if missing.
        state: nested dictionaries and lists of tensors and JSON values.
        step: finished optimizer steps.
        facts: what the manifest should say about the run; JSON values without floats.
        keep: newest good checkpoints that stay.
        metadata: strings for the header of the tensor file.
    Returns:
        The folder of the checkpoint.
    Raises:
        OutputError: the disk is full or not writable; what was written for this step is removed.
    """
    target = folder / f"step-{step:08d}"
    temporary = folder / f"{_TEMPORARY_PREFIX}{target.name}-{uuid.uuid4().hex[:8]}"
    with output_errors(folder):
        try:
            temporary.mkdir(parents=True)
            _write_files(temporary, state, step=step, facts=facts, metadata=metadata)
            _put_in_place(temporary, target)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    # The new checkpoint is safe by now; what cannot be removed is tried again at the next save.
    with contextlib.suppress(OSError):
        prune(folder, keep)
    return target


def load_newest(folder: Path, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies.

    Args:
        folder: `OUT/checkpoints`; need not exist.
        warn: told about every newer checkpoint that had to be passed over, and why.
    Returns:
        None if no checkpoint was ever written there.
    Raises:
        CheckpointError: there are checkpoints but every one is damaged.
    """
    candidates = list_checkpoints(folder)
    failures: list[str] = []
    for path in candidates:
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            failures.append(str(error))
            continue
        for failure in failures:
            warn(f"{failure}; going on from step {checkpoint.step} instead")
        return checkpoint
    if failures:
        raise CheckpointError(
            "checkpoint: none verifies: "
            + "; ".join(failures)
            + f"; to start from step 0, remove {folder}"
        )
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders that carry a checkpoint's name, newest first; nothing is verified."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _FOLDER_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify one checkpoint folder and read it.

    Raises:
        CheckpointError: naming the file that is missing, cut, changed or not understood.
    """
    manifest = verify_checkpoint(path)
    try:
        skeleton = json.loads((path / _STATE_NAME).read_text(encoding="utf-8"))
        state = _unflatten(skeleton, _read_tensors(path / _TENSORS_NAME))
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"checkpoint: {path} cannot be read: {error}") from error
    return Checkpoint(path, manifest["step"], manifest, state)


def verify_checkpoint(path: Path, *, hashes: bool = True) -> dict[str, Any]:
    """Compare a checkpoint folder with its manifest.

    Args:
        path: the folder.
        hashes: also read every byte; sizes and the manifest itself are always checked.
    Returns:
        The manifest.
    Raises:
        CheckpointError: naming the file that is missing, cut or changed.
    """
    manifest = read_manifest(path)
    described = f"step-{manifest['step']:08d}", {_TENSORS_NAME, _STATE_NAME}
    if (path.name, set(manifest["files"])) != described:
        raise CheckpointError(f"checkpoint: {path / MANIFEST_NAME} does not describe {path.name}")
    for name, noted in manifest["files"].items():
        file = path / name
        try:
            require_plain(file)
        except OSError as error:
            raise CheckpointError(f"checkpoint: {file} cannot be read: {error.strerror}") from error
        check_unchanged(file, noted, hashes=hashes)
    return manifest


def prune(folder: Path, keep: int) -> None:
    """Remove what is older than the newest `keep` good ones; a damaged one takes no place."""
    good = 0
    for path in list_checkpoints(folder):
        if good >= max(keep, 1):
            _remove_folder(path)
            continue
        with contextlib.suppress(CheckpointError):
            verify_checkpoint(path, hashes=False)
            good += 1


def sweep(folder: Path) -> None:
    """Remove what killed saves left behind; only the owner of the run directory may call it."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if not path.name.startswith(_TEMPORARY_PREFIX):
            continue
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)


def differing_keys(former: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Settings that changed and would change what is computed, as `key: old -> new`.

    Args:
        former: nested mapping, as `config.to_dict` gives it.
        current: likewise.
    """
    old, new = (dict(_leaves(json.loads(json.dumps(part)))) for part in (former, current))
    return [
        f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}"
        for key in dict.fromkeys([*old, *new])
        if key not in HARMLESS_KEYS and old.get(key) != new.get(key)
    ]


def config_hash(config: dict[str, Any]) -> str:
    """SHA-256 over the settings that change what is computed."""
    relevant = {key: value for key, value in _leaves(config) if key not in HARMLESS_KEYS}
    return hashlib.sha256(canonical_json(relevant)).hexdigest()


def _write_files(
    folder: Path,
    state: dict[str, Any],
    *,
    step: int,
    facts: dict[str, Any],
    metadata: dict[str, str] | None,
) -> None:
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_flatten(state, "", tensors, {})).encode("utf-8")
    sha256, size = write_tensors(folder / _TENSORS_NAME, tensors, metadata)
    _write_durably(folder / _STATE_NAME, skeleton)
    manifest = {
        "facts": facts,
        "files": {
            _TENSORS_NAME: {"sha256": sha256, "size": size},
            _STATE_NAME: {"sha256": hashlib.sha256(skeleton).hexdigest(), "size": len(skeleton)},
        },
        "format": FORMAT_VERSION,
        "step": step,
    }
    _write_durably(folder / MANIFEST_NAME, sealed(manifest))
    sync_folder(folder)


def _put_in_place(temporary: Path, target: Path) -> None:
    if target.exists():
        try:
            verify_checkpoint(target)
        except CheckpointError:
            _remove_folder(target)
        else:  # the same step of the same run: equal by construction, and already safe
            shutil.rmtree(temporary)
            return
    os.replace(temporary, target)
    sync_folder(target.parent)


def _remove_folder(path: Path) -> None:
    """Remove a checkpoint in two moves, so that no half of it keeps its name."""
    doomed = path.with_name(f"{_TEMPORARY_PREFIX}old-{path.name}-{uuid.uuid4().hex[:8]}")
    os.replace(path, doomed)
    if doomed.is_symlink() or not doomed.is_dir():
        doomed.unlink()
    else:
        shutil.rmtree(doomed)


def _flatten(value: Any, name: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> Any:
    """The JSON part of a state; tensors are collected by name, one that occurs twice only once."""
    if isinstance(value, Tensor):
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() == 0 or key not in seen:
            seen[key] = name
            tensors[name] = value
        return {"$tensor": seen[key]}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"checkpoint: keys of {name or 'the state'} must be strings")
        prefix = f"{name}." if name else ""
        return {k: _flatten(v, f"{prefix}{k}", tensors, seen) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_flatten(entry, f"{name}.{i}", tensors, seen) for i, entry in enumerate(value)]
    return value


def _unflatten(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(skeleton, dict):
        if set(skeleton) == {"$tensor"}:
            return tensors[skeleton["$tensor"]]
        return {key: _unflatten(value, tensors) for key, value in skeleton.items()}
    if isinstance(skeleton, list):
        return [_unflatten(value, tensors) for value in skeleton]
    return skeleton


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _leaves(mapping: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping."""
    found: list[tuple[str, Any]] = []
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        found += _leaves(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found
