from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_fast.data.datasets import open_images
from dinov2_fast.data.photo_crops import (
    TEST_SHARE,
    TRAIN_SHARE,
    CropSettings,
    write_photo_crops,
)
from dinov2_fast.errors import DataError

SMALL = CropSettings(
    train_per_photo=30, test_per_photo=20, min_px=16, max_px=40, photo_px=64, saved_px=8
)


def _ramp(path: Path, width: int = 300, height: int = 90) -> Path:
    """A picture whose brightness is the position of the column: crops tell where they are from."""
    columns = np.linspace(0, 255, width).round().astype(np.uint8)
    Image.fromarray(np.tile(columns, (height, 1))).save(path)
    return path


def _pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize("size", [(300, 90), (150, 90), (1000, 640), (97, 61)])
def test_train_and_test_crops_share_no_pixel(tmp_path: Path, size: tuple[int, int]):
    photo = _ramp(tmp_path / "photo.png", *size)
    write_photo_crops({"ramp": photo}, tmp_path / "out", settings=SMALL)
    train, test = (_pixels(tmp_path / "out" / part / "ramp") for part in ("train", "test"))
    # Bicubic filters overshoot on no ramp, and the parts were cut before they were resized.
    assert train.max() <= 255 * TRAIN_SHARE + 1
    assert test.min() >= 255 * (1 - TEST_SHARE) - 1
    assert train.max() < test.min()


def test_crops_reach_over_the_whole_part_they_may_use(tmp_path: Path):
    photo = _ramp(tmp_path / "photo.png")
    write_photo_crops({"ramp": photo}, tmp_path / "out", settings=SMALL)
    train, test = (_pixels(tmp_path / "out" / part / "ramp") for part in ("train", "test"))
    assert train.min() < 20
    assert train.max() > 120
    assert test.min() < 175
    assert test.max() > 235


def test_files_are_counted_numbered_and_of_one_size(tmp_path: Path):
    photos = {name: _ramp(tmp_path / f"{name}.png") for name in ("a", "b")}
    written = write_photo_crops(photos, tmp_path / "out", settings=SMALL)
    assert written == {"train": 60, "test": 40}
    source = open_images(tmp_path / "out" / "train")
    assert (len(source), source.class_names) == (60, ["a", "b"])
    assert _pixels(tmp_path / "out" / "test" / "b").shape == (20, 8, 8, 3)
    assert (tmp_path / "out" / "test" / "b" / "019.png").is_file()


def test_crops_of_a_photograph_depend_on_the_seed_and_not_on_the_other_photographs(tmp_path: Path):
    photos = {name: _ramp(tmp_path / f"{name}.png") for name in ("a", "b")}
    for name, chosen, seed in (
        ("both", photos, 0),
        ("one", {"b": photos["b"]}, 0),
        ("other", photos, 1),
    ):
        write_photo_crops(chosen, tmp_path / name, settings=SMALL, seed=seed)
    both, one, other = (_pixels(tmp_path / n / "train" / "b") for n in ("both", "one", "other"))
    assert np.array_equal(both, one)
    assert not np.array_equal(both, other)
    assert not np.array_equal(both, _pixels(tmp_path / "both" / "train" / "a"))


def test_a_photograph_that_is_broken_or_too_narrow_is_named(tmp_path: Path):
    (tmp_path / "broken.png").write_bytes(b"none")
    narrow = _ramp(tmp_path / "narrow.png", 60, 90)
    with pytest.raises(DataError, match=r"broken\.png"):
        write_photo_crops({"x": tmp_path / "broken.png"}, tmp_path / "out", settings=SMALL)
    with pytest.raises(DataError, match=r"narrow\.png.*less narrow"):
        write_photo_crops({"x": narrow}, tmp_path / "out", settings=SMALL)
