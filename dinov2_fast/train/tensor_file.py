"""Writes safetensors files as a stream: one tensor at a time, hashed on the way, always alike."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path

import torch
from torch import Tensor

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def replace_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> tuple[str, int]:
    """Write a safetensors file so that the path holds the old file or the whole new one.

    Args:
        path: the file.
        tensors: see `write_tensors`.
        metadata: see `write_tensors`.
    Returns:
        See `write_tensors`.
    Raises:
        OSError: the disk is full or not writable; the old file stays.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        written = write_tensors(temporary, tensors, metadata)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return written


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> tuple[str, int]:
    """Write a safetensors file, flushed to the disk.

    The library's own writer holds every tensor twice, orders metadata at random and keeps the
    hash to itself; equal runs must leave equal files.

    Args:
        path: the file; must not exist.
        tensors: any devices; written in the order of element size, then name.
        metadata: strings a reader finds in the header.
    Returns:
        SHA-256 in hexadecimal and size in bytes of the file.
    Raises:
        OSError: the disk is full or not writable.
    """
    # Wide types first keep every tensor aligned to its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            file.write(block)
            digest.update(block)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            block = flat.view(torch.uint8).numpy().data
            file.write(block)
            digest.update(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), 8 + len(text) + end
