"""Pictures in every format, and archives, that the tests of the data package share."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(width: int = 40, height: int = 30, *, seed: int = 0) -> Image.Image:
    """A smooth RGB picture (so that lossy formats keep it) that no mirroring maps to itself."""
    rng = np.random.default_rng(seed)
    corners = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return corners.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(root: Path, count: int, *, px: int = 40, kind: str = "PNG") -> Path:
    """A folder of different pictures 000.png, 001.png, ..."""
    root.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        data = encoded(picture(px, px, seed=index), kind)
        (root / f"{index:03}.{kind.lower()}").write_bytes(data)
    return root


def write_tar(path: Path, members: dict[str, bytes], *, layout: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of regular files."""
    with tarfile.open(path, "w", format=layout) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path
