"""Labelled folders of images: which vote or train, which are judged, one numbering of classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dinov2_fast.data.datasets import open_images
from dinov2_fast.data.image_source import ImageSource, printable
from dinov2_fast.errors import ConfigError, DataError
from dinov2_fast.features import Features

TEST_FOLDERS = ("test", "val")


@dataclass(frozen=True)
class Split:
    """Features of training and judged images under one numbering of the classes."""

    train: Features
    test: Features
    train_labels: Tensor
    test_labels: Tensor
    class_names: list[str]


def find_folders(
    data: Path | None, train: Path | None, test: Path | None
) -> tuple[Path, Path | None]:
    """Where the training and the judged images lie; None for the latter: leave one out.

    Args:
        data: folder with train/ and test/ or val/, or one folder of classes.
        train: training images, instead of `data`.
        test: judged images, only with `train`.

    Raises:
        ConfigError: neither or both ways are used.
        DataError: `data` has train/ alone.
    """
    if (data is None) == (train is None):
        raise ConfigError("eval knn: give either --data DIR, or --train DIR and --test DIR")
    if train is not None:
        return train, test
    assert data is not None
    if test is not None:
        raise ConfigError(
            "eval knn: --test goes with --train; --data DIR finds DIR/test or DIR/val"
        )
    if not (data / "train").is_dir():
        return data, None
    for name in TEST_FOLDERS:
        if (data / name).is_dir():
            return data / "train", data / name
    raise DataError(
        f"eval knn: {data} has train/ but neither test/ nor val/; "
        f"for leave-one-out on it give --train {data / 'train'}"
    )


def open_labelled(path: Path, *, min_classes: int = 1) -> ImageSource:
    """The images of a folder whose sub-folders are the classes.

    Args:
        path: the folder.
        min_classes: classes there must be; with one to choose from every answer is right.

    Raises:
        DataError: there are no images, none has a label, or there are fewer classes.
    """
    source = open_images(path)
    labels = {source.label(index) for index in range(len(source))} - {None}
    if not labels:
        raise DataError(
            f"eval knn: the images of {path} have no labels; "
            "put each class into a folder of its own below it"
        )
    if len(labels) < min_classes:
        names = ", ".join(source.class_names[label] for label in labels if label is not None)
        raise DataError(
            f"eval knn: expected images of {min_classes} classes or more that vote, got "
            f"{printable(names)} alone in {path}; classes are the folders right below it"
        )
    return source


def common_classes(train: Features, test: Features) -> Split:
    """Number the classes by name, since two folders number theirs separately.

    Args:
        train: features of the training images; unlabelled ones are left out.
        test: features of the judged images; unlabelled ones are left out.

    Raises:
        DataError: no class has both training and judged images.
    """
    train, test = train.labelled(), test.labelled()
    names = sorted({*train.class_names, *test.class_names})
    number = {name: index for index, name in enumerate(names)}
    train_labels, test_labels = (
        torch.tensor([number[f.class_names[label]] for label in f.labels.tolist()])
        for f in (train, test)
    )
    if not set(train_labels.tolist()) & set(test_labels.tolist()):
        raise DataError(
            "eval knn: train and test have no class in common; classes are folder names, "
            f"here {', '.join(train.class_names[:3])}... and {', '.join(test.class_names[:3])}..."
        )
    return Split(train, test, train_labels, test_labels, names)
