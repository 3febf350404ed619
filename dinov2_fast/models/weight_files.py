"""Weight files on disk: safetensors, torch pickles without code, Hugging Face folders."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.errors import CheckpointError, OutputError
from dinov2_fast.manifest import check_unchanged, noted_of
from dinov2_fast.models.mismatch import listed
from dinov2_fast.models.training_dumps import State

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
DESCRIPTION_KEY = "dinov2_fast.model"  # where a safetensors file says what shapes do not

_CONTAINERS = ("model", "state_dict", "module")
_MAX_NESTING = 4


@dataclass(frozen=True)
class WeightFile:
    """What a file holds.

    `description` has the keyword arguments of the model that the file itself states, for instance
    `num_heads`, which no shape tells.
    """

    state: State
    description: dict[str, Any] = field(default_factory=dict)


def load_weights(path: str | Path) -> State:
    """Keys and tensors of a weight file, on the CPU, under the names the file has.

    Args:
        path: `.safetensors`; `.pth`, `.pt`, `.bin` or `.ckpt`, read without running code; or a
            folder saved by transformers. Of the contents of a training checkpoint the networks
            are taken: `teacher` (as `teacher.…` keys), else `student`, else `model` or
            `state_dict`.
    Raises:
        CheckpointError: missing, damaged, with code inside, not a mapping of tensors, or no more
            the file whose SHA-256 its run noted beside it.
    """
    return read_weight_file(path).state


def read_weight_file(path: str | Path) -> WeightFile:
    """`load_weights` with what else the file says about the model.

    Args:
        path: see `load_weights`.
    Raises:
        CheckpointError: see `load_weights`.
    """
    path = Path(path)
    if path.is_dir():
        return _read_transformers_folder(path)
    if not path.exists():
        raise CheckpointError(f"weights: {path} does not exist")
    _check_unchanged(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return WeightFile(_tensors_of(_read_pickle(path), path))
    raise CheckpointError(
        f"weights: expected a name ending in .safetensors, {', '.join(PICKLE_SUFFIXES)} or a "
        f"folder, got {path.name}"
    )


def write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors so that the file is either whole or not there.

    Args:
        path: the file; replaced if it exists.
        state: tensors on any device.
        metadata: at most one entry keeps equal files equal, the library orders entries at random.
    Raises:
        OutputError: the disk is full or not writable.
    """
    from safetensors.torch import save_file

    tensors = _self_contained(state)
    write_whole(path, lambda part: save_file(tensors, part, metadata=metadata or None))


def write_pickle(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a bare state dict with torch, whole or not at all.

    Raises:
        OutputError: the disk is full or not writable.
    """
    tensors = _self_contained(state)
    write_whole(path, lambda part: torch.save(tensors, part))


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, flush it to the disk and move it into place.

    Raises:
        OutputError: any of it fails; no part of the file stays behind.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except Exception as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise OutputError(f"weights: {path} cannot be written: {error}") from error


def _check_unchanged(path: Path) -> None:
    """Refuse a file of a run that is not the one the run wrote."""
    try:
        noted = noted_of(path)
        if noted is not None:
            check_unchanged(path, noted)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; restore it from a copy, or give another checkpoint of the run"
        ) from error


def _read_safetensors(path: Path) -> WeightFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            keys = list(file.keys())
            # A checkpoint also holds student and moments, several times the size of the teacher.
            teacher = [key for key in keys if key.startswith("teacher.")]
            state = {key: file.get_tensor(key) for key in teacher or keys}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"weights: {path} is damaged or not a safetensors file: {error}"
        ) from error
    return WeightFile(state, _description(metadata, path))


def _description(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Keyword arguments of the model from a file's metadata."""
    try:
        description = json.loads(metadata.get(DESCRIPTION_KEY, "{}"))
    except ValueError as error:
        raise CheckpointError(f"weights: {path} has damaged metadata: {error}") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"weights: {path} has damaged metadata: {description!r}")
    return description


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # Of a pickle that is not torch's: a request to tell torch's developers.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The rest of torch's message tells people to switch the protection off.
        lines = [line.strip() for line in str(error).splitlines()]
        reasons = [
            line for line in lines if line and not re.search(r"weights_only|torch\.load", line)
        ]
        reason = reasons[0] if reasons else "torch gives no reason"
        raise CheckpointError(
            f"weights: {path} is damaged or holds more than tensors, and is not run: {reason}; "
            "convert it to .safetensors where it was made"
        ) from error
    except Exception as error:  # damaged archives raise many types, from RuntimeError to KeyError
        raise CheckpointError(f"weights: {path} is damaged or no torch file: {error}") from error


def _tensors_of(content: Any, path: Path, nesting: int = 0) -> State:
    """The networks of a training checkpoint, or the state dict that the content is."""
    if not isinstance(content, Mapping) or nesting > _MAX_NESTING:
        raise CheckpointError(
            f"weights: expected {path} to hold a state dict, got {type(content).__name__}"
        )
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return {str(key): value for key, value in content.items()}
    for network in ("teacher", "student"):
        if isinstance(content.get(network), Mapping):
            inner = _tensors_of(content[network], path, nesting + 1)
            return {f"{network}.{key}": value for key, value in inner.items()}
    for container in _CONTAINERS:
        if isinstance(content.get(container), Mapping):
            return _tensors_of(content[container], path, nesting + 1)
    raise CheckpointError(
        f"weights: expected {path} to hold a state dict, or one under teacher, student, "
        f"{', '.join(_CONTAINERS)}; got the keys {listed([str(key) for key in content]) or 'none'}"
    )


def _read_transformers_folder(folder: Path) -> WeightFile:
    """A folder written by `save_pretrained`, in one file or in shards."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            # Only names: an index must not lead out of its folder.
            names = sorted({Path(shard).name for shard in shards})
        else:
            names = ["model.safetensors"]
            if not (folder / names[0]).is_file():
                names = ["pytorch_model.bin"]
        heads = int(config["num_attention_heads"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"weights: expected {folder} to be a folder saved by transformers (config.json and "
            f"model.safetensors), got {type(error).__name__}: {error}; give a weight file"
        ) from error
    state: State = {}
    for name in names:
        state.update(read_weight_file(folder / name).state)
    return WeightFile(state, {"num_heads": heads})


def _self_contained(state: Mapping[str, Tensor]) -> State:
    """Tensors that share memory with nothing: files would hold too much, or refuse."""
    out: State = {}
    for key, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        owns_all = tensor.untyped_storage().nbytes() == tensor.nbytes
        out[key] = tensor if owns_all else tensor.clone()
    return out
