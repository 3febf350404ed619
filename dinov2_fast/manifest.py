"""What a folder notes about its files, size and SHA-256, and whether they are still those files.

A checkpoint's `MANIFEST.json` notes its own hash too. A finished run's `summary.json` notes the
teacher that it stands beside.
"""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

from dinov2_fast.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST_NAME, SUMMARY_NAME = "MANIFEST.json", "summary.json"
# What each of them notes of the files that `noted_of` is asked about.
_CHECKPOINT_TENSORS_NAME, _TEACHER_NAME = "state.safetensors", "teacher.safetensors"
# A manifest is about 1 KB, a summary 2; more is not ours and is not read.
_MAX_NOTE_BYTES = 1 << 20


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that hashes are taken of."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode("utf-8")


def sealed(manifest: dict[str, Any]) -> bytes:
    """Content of a manifest's file: what it says, and the hash of that."""
    digest = hashlib.sha256(canonical_json(manifest)).hexdigest()
    return canonical_json({**manifest, "self_sha256": digest})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder: intact, of this format, with well-formed entries.

    Args:
        folder: the checkpoint.
    Returns:
        `format`, `step`, `facts` and `files`: name -> `sha256` and `size`.
    Raises:
        CheckpointError: naming what is missing, changed or not understood.
    """
    file = folder / MANIFEST_NAME
    try:
        require_plain(file)
        with open(file, "rb") as stream:
            content = stream.read(_MAX_NOTE_BYTES)
        manifest = json.loads(content)
        del manifest["self_sha256"]
        # Byte for byte what we would write: no second spelling, no repeated key gets through.
        intact = content == sealed(manifest)
        known = manifest["format"] == FORMAT_VERSION
        formed = isinstance(manifest["step"], int) and all(
            set(entry) == {"sha256", "size"} for entry in manifest["files"].values()
        )
    except OSError as error:
        raise CheckpointError(f"checkpoint: {file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint: {file} is not a manifest: {error}") from error
    if not intact:
        raise CheckpointError(f"checkpoint: {file} was changed: its SHA-256 does not agree")
    if not known:
        raise CheckpointError(
            f"checkpoint: {file} must have format {FORMAT_VERSION}, got {manifest['format']}; "
            "use the release of dinov2_fast that wrote it"
        )
    if not formed:
        raise CheckpointError(f"checkpoint: {file} does not describe {folder.name}")
    return manifest


def noted_of(file: Path) -> dict[str, Any] | None:
    """What stands beside a file about its size and hash; None where nothing does.

    Args:
        file: tensors of a checkpoint, the teacher of a finished run, or any other file.
    Returns:
        `sha256` and `size`.
    Raises:
        CheckpointError: a checkpoint's manifest that is damaged, or notes no such file.
    """
    if file.name == _CHECKPOINT_TENSORS_NAME and (file.parent / MANIFEST_NAME).exists():
        entry = read_manifest(file.parent)["files"].get(file.name)
        if entry is None:
            raise CheckpointError(
                f"checkpoint: {file.parent / MANIFEST_NAME} does not describe {file.name}"
            )
        return entry
    if file.name == _TEACHER_NAME:
        # Runs of older releases noted nothing; other programs write files of this name, too.
        try:
            with open(file.parent / SUMMARY_NAME, "rb") as stream:
                entry = json.loads(stream.read(_MAX_NOTE_BYTES))["files"][file.name]
                return {"sha256": entry["sha256"], "size": entry["size"]}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
    return None


def require_plain(file: Path) -> None:
    """Refuse a link or anything else that is no plain file.

    Raises:
        CheckpointError: naming the file.
        OSError: it cannot be looked at.
    """
    if not stat.S_ISREG(file.lstat().st_mode):
        raise CheckpointError(f"checkpoint: {file} must be a plain file")


def check_unchanged(file: Path, noted: dict[str, Any], *, hashes: bool = True) -> None:
    """Compare a file with what was noted when it was written.

    Args:
        file: to be compared.
        noted: its `size` in bytes and its `sha256`.
        hashes: also read every byte.
    Raises:
        CheckpointError: naming the file that is missing, cut or changed.
    """
    try:
        size = file.stat().st_size
        if size != noted["size"]:
            raise CheckpointError(f"checkpoint: {file} must have {noted['size']} bytes, got {size}")
        if hashes and _sha256(file) != noted["sha256"]:
            raise CheckpointError(f"checkpoint: {file} was changed: its SHA-256 does not agree")
    except OSError as error:
        raise CheckpointError(f"checkpoint: {file} cannot be read: {error.strerror}") from error


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
