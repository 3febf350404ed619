"""Images wherever they lie: a folder, a text file listing them, a tar file or a folder of tars."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dinov2_fast.data.decoding import IMAGE_SUFFIXES, MAX_FILE_BYTES, UnreadableImage
from dinov2_fast.data.image_source import ImageSource, number_labels, printable
from dinov2_fast.data.tar_index import TarSource, looks_like_tar
from dinov2_fast.errors import DataError

logger = logging.getLogger(__name__)

_COMPRESSED_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}


def open_images(path: str | os.PathLike[str]) -> ImageSource:
    """The images at a path, in an order that depends on their names alone.

    Args:
        path: a folder (searched recursively; symbolic links are followed, each folder is entered
            once, names beginning with a dot are skipped), a text file with one path per line
            (absolute or relative to the text file's folder, optionally followed by a tab and a
            label), a tar file, or a folder of tar files.

    Raises:
        DataError: nothing there, nothing usable in it, or a compressed archive.
    """
    root = Path(path)
    try:
        mode = root.stat().st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"data: cannot open {printable(str(root))}: {reason}") from error
    if stat.S_ISDIR(mode):
        return _open_folder(root)
    if not stat.S_ISREG(mode):
        raise DataError(f"data: {printable(str(root))} is neither a folder nor a regular file")
    return _open_file(root)


def _open_folder(root: Path) -> ImageSource:
    images, tars = [], []
    for name in _walk(os.fsencode(root)):
        suffix = os.path.splitext(name)[1].lower()
        if os.fsdecode(suffix) in IMAGE_SUFFIXES:
            images.append(name)
        elif suffix == b".tar":
            tars.append(name)
    if images:
        if tars:
            logger.warning(
                "data: %s holds image files and %d tar files; the tar files are not read",
                printable(str(root)),
                len(tars),
            )
        return FolderSource(root, sorted(images))
    if tars:
        return TarSource([root / os.fsdecode(name) for name in sorted(tars)])
    raise DataError(
        f"data: found no images in {printable(str(root))} or the folders below it; looked for "
        f"files ending in {', '.join(sorted(IMAGE_SUFFIXES))} or .tar, upper or lower case"
    )


def _open_file(path: Path) -> ImageSource:
    shown = printable(str(path))
    try:
        with path.open("rb") as file:
            head = file.read(65536)
    except OSError as error:
        raise DataError(f"data: cannot read {shown}: {error}") from error
    if looks_like_tar(head):
        return TarSource([path])
    for magic, kind in _COMPRESSED_MAGIC.items():
        if head.startswith(magic):
            raise DataError(
                f"data: {shown} is compressed ({kind}), which allows no random access; unpack it "
                "to a plain .tar or to a folder first"
            )
    if b"\0" in head or path.suffix.lower() == ".tar":
        raise DataError(
            f"data: {shown} is neither a tar file nor a text file with one image path per line; "
            "to train on single images, give the folder they lie in"
        )
    return ListSource(path)


def _walk(root: bytes) -> Iterator[bytes]:
    """Paths of the regular files below a folder, relative to it; order unspecified.

    Folders reached through symbolic links come after all real ones, and a folder already entered
    is not entered again: loops end, and a file is seen under its real path where it has one.
    """
    pending, linked = [b""], []
    entered = set()
    while pending or linked:
        folder = pending.pop() if pending else linked.pop(0)
        location = os.path.join(root, folder)
        try:
            status = os.stat(location)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(location) as entries:
                listing = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise DataError(
                    f"data: cannot read {printable(os.fsdecode(root))}: {error}"
                ) from error
            logger.warning("data: skipped folder %s: %s", printable(os.fsdecode(location)), error)
            continue
        for entry in listing:
            if entry.name.startswith(b"."):
                continue
            path = os.path.join(folder, entry.name)
            try:
                if entry.is_dir():
                    (linked if entry.is_symlink() else pending).append(path)
                elif entry.is_file():
                    yield path
            except OSError as error:  # a link to itself, a target that may not be looked at
                shown = printable(os.fsdecode(os.path.join(root, path)))
                logger.warning("data: skipped %s: %s", shown, error)


def read_regular_file(path: bytes | str) -> bytes:
    """All bytes of a regular file; never waits on a pipe or a device.

    Raises:
        UnreadableImage: not there, not a regular file, above the size cap, or an I/O error.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableImage("not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise UnreadableImage(f"{status.st_size} bytes, more than {MAX_FILE_BYTES}")
            return file.read()
    except UnreadableImage:
        raise
    except (OSError, ValueError) as error:
        raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from error


class _Strings:
    """Many byte strings in two arrays: small, and pickled in one piece."""

    def __init__(self, strings: list[bytes]) -> None:
        self._text = b"".join(strings)
        self._ends = np.cumsum([0, *map(len, strings)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"image index must be in 0..{len(self) - 1}, got {index}")
        return self._text[self._ends[index] : self._ends[index + 1]]


class FolderSource(ImageSource):
    """Image files below a folder; the first folder level, where there is one, is the label."""

    def __init__(self, root: Path, names: list[bytes]) -> None:
        """Takes paths relative to the root, in their final order."""
        self._root = os.fsencode(root.absolute())
        self._names = _Strings(names)
        self._labels, self.class_names = number_labels(
            os.fsdecode(name.split(b"/", 1)[0]) if b"/" in name else None for name in names
        )

    def __len__(self) -> int:
        """Number of images."""
        return len(self._names)

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        return read_regular_file(os.path.join(self._root, self._names[index]))

    def name(self, index: int) -> str:
        """The file's absolute path."""
        return os.fsdecode(os.path.join(self._root, self._names[index]))


class ListSource(ImageSource):
    """Image files named by a text file: a path per line, optionally a tab and a label."""

    _NUM_PROBED = 100

    def __init__(self, path: Path) -> None:
        """Reads the list.

        Raises:
            DataError: no lines, or none of the first hundred files exists.
        """
        self._folder = os.fsencode(path.absolute().parent)
        try:
            text = path.read_bytes()
        except OSError as error:
            raise DataError(f"data: cannot read {printable(str(path))}: {error}") from error
        names, labels = [], []
        for line in text.removeprefix(b"\xef\xbb\xbf").splitlines():
            name, _, label = line.partition(b"\t")
            if name.strip():
                names.append(name.strip())
                labels.append(os.fsdecode(label.strip()) or None)
        if not names:
            raise DataError(f"data: the list {printable(str(path))} names no images")
        probed = names[: self._NUM_PROBED]
        if not any(b"\0" not in name and os.path.isfile(self._path(name)) for name in probed):
            raise DataError(
                f"data: none of the first {len(probed)} files named by {printable(str(path))} "
                f"exists, starting with {printable(os.fsdecode(probed[0]))}; relative paths are "
                f"looked up in {printable(os.fsdecode(self._folder))}"
            )
        self._names = _Strings(names)
        self._labels, self.class_names = number_labels(labels)

    def _path(self, name: bytes) -> bytes:
        return os.path.join(self._folder, name)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._names)

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        return read_regular_file(self._path(self._names[index]))

    def name(self, index: int) -> str:
        """The file's path; relative ones are completed with the list's folder."""
        return os.fsdecode(self._path(self._names[index]))
