"""What every source of images offers, and how labels are numbered and names are printed."""

from __future__ import annotations

import abc
from collections.abc import Iterable

import numpy as np


class ImageSource(abc.ABC):
    """Encoded images by index; small to pickle and safe to use from any process it is sent to."""

    class_names: list[str]
    """Names of the labels; empty when the images have none."""
    _labels: np.ndarray | None = None
    """int32 label of every image, -1 for none."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abc.abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded bytes of an image.

        Raises:
            UnreadableImage: the file is gone, not a regular file, too large or cannot be read.
        """

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Where the image lies; may hold any character, so print it with `printable`."""

    def label(self, index: int) -> int | None:
        """Index into `class_names`, or `None` when this image has no label."""
        if self._labels is None or self._labels[index] < 0:
            return None
        return int(self._labels[index])

    def offset(self, index: int) -> int | None:
        """Byte offset of the image inside its tar file; `None` for plain files."""
        del index
        return None


def printable(text: str) -> str:
    """Text with control characters, escapes and undecodable bytes written as backslash escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def number_labels(
    labels: Iterable[str | None],
) -> tuple[np.ndarray | None, list[str]]:
    """Labels as indices into their sorted names; whole numbers sort by value.

    Args:
        labels: one per image, `None` where an image has none.

    Returns:
        int32 indices (-1 = none) and the names; `(None, [])` when no image has a label.
    """
    labels = list(labels)
    distinct = {label for label in labels if label is not None}
    if not distinct:
        return None, []
    whole = all(label.isascii() and label.removeprefix("-").isdigit() for label in distinct)
    names = sorted(distinct, key=(lambda label: (int(label), label)) if whole else None)
    numbers: dict[str | None, int] = {label: number for number, label in enumerate(names)}
    return np.array([numbers.get(label, -1) for label in labels], dtype=np.int32), names
