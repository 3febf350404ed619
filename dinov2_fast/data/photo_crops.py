"""A labelled image set from a few photographs: the class of a crop is the photograph it is from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2_fast.errors import DataError

TRAIN_SHARE = 0.55
"""Training crops lie in this share of the width, from the left edge."""
TEST_SHARE = 0.40
"""Test crops lie in this share, from the right edge; no pixel is in both."""


@dataclass(frozen=True)
class CropSettings:
    """How crops are taken from each photograph."""

    train_per_photo: int = 90
    """Crops from the left part."""
    test_per_photo: int = 30
    """Crops from the right part."""
    min_px: int = 64
    """Smallest side of a crop, after the photograph was resized."""
    max_px: int = 128
    """Largest side of a crop, after the photograph was resized."""
    photo_px: int = 512
    """Shorter edge that each photograph is resized to, so that crops show things of like size."""
    saved_px: int = 48
    """Side of the files."""


def write_photo_crops(
    photographs: Mapping[str, Path],
    out: Path,
    *,
    settings: CropSettings | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Write OUT/train/NAME/NNN.png and OUT/test/NAME/NNN.png.

    The two parts are cut apart before anything is resized, so that no interpolation carries a
    pixel across. The crops of a photograph depend on the seed, its name and its pixels alone.

    Args:
        photographs: class name -> file.
        out: folder; files of the same names are replaced.
        settings: sizes and counts.
        seed: of places and sizes.

    Returns:
        Files written for `train` and `test`.

    Raises:
        DataError: a photograph cannot be read or is too small.
    """
    settings = settings or CropSettings()
    written = {"train": 0, "test": 0}
    for name, path in sorted(photographs.items()):
        counts = {"train": settings.train_per_photo, "test": settings.test_per_photo}
        parts = _parts(path, settings)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = np.random.default_rng(list(digest))
        for part, image in parts.items():
            folder = out / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(counts[part]):
                crop = _random_crop(image, settings, generator)
                crop.save(folder / f"{index:03d}.png")
            written[part] += counts[part]
    return written


def _parts(path: Path, settings: CropSettings) -> dict[str, Image.Image]:
    """The left and the right part of a photograph, resized."""
    try:
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
    except (OSError, ValueError) as error:
        raise DataError(f"photo crops: cannot read {path}: {error}") from error
    width, height = photo.size
    left, right = int(width * TRAIN_SHARE), width - int(width * TEST_SHARE)
    scale = settings.photo_px / min(width, height)
    parts = {}
    for part, (begin, end) in {"train": (0, left), "test": (right, width)}.items():
        size = round((end - begin) * scale), round(height * scale)
        if min(size) < settings.max_px:
            raise DataError(
                f"photo crops: {path} must be less narrow, its {part} part is {size[0]} x "
                f"{size[1]} px and crops have up to {settings.max_px} px; leave the file out"
            )
        piece = photo.crop((begin, 0, end, height))
        parts[part] = piece.resize(size, Image.Resampling.BICUBIC)
    return parts


def _random_crop(
    image: Image.Image, settings: CropSettings, generator: np.random.Generator
) -> Image.Image:
    side = int(generator.integers(settings.min_px, settings.max_px + 1))
    x = int(generator.integers(0, image.width - side + 1))
    y = int(generator.integers(0, image.height - side + 1))
    crop = image.crop((x, y, x + side, y + side))
    return crop.resize((settings.saved_px, settings.saved_px), Image.Resampling.BICUBIC)
