"""k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.errors import NumericsError
from dinov2_fast.evaluation.labelled_folders import (
    Split,
    common_classes,
    find_folders,
    open_labelled,
)
from dinov2_fast.features import extract_features
from dinov2_fast.models.frozen import load_model

NEIGHBOR_COUNTS = (10, 20, 100, 200)
TEMPERATURE = 0.07

# Similarities of one chunk: 2^25 floats are 128 MiB, whatever the size of the training set.
_MAX_CHUNK_ELEMENTS = 1 << 25
_MAX_CHUNK_ROWS = 1024


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    ks: Sequence[int] = NEIGHBOR_COUNTS,
    temperature: float = TEMPERATURE,
) -> dict[int, Tensor]:
    """Label of each test image by a weighted vote of its nearest training images.

    Neighbours are ranked by cosine similarity; a neighbour's vote is its share of
    softmax(similarity / temperature) over the largest k. Equal similarities rank by position in
    the training set, equal votes go to the smaller label, so the answer is unique.

    Args:
        train_features: [n, C] floating point, any device; need not be normalised.
        train_labels: [n] integers, at least 0.
        test_features: [m, C] on the same device.
        ks: neighbours that vote; one larger than n lets all n vote.
        temperature: divides the similarities.

    Returns:
        For each k the predicted labels, int64 [m] on the CPU.

    Raises:
        ValueError: shapes, labels, ks or temperature that make no sense.
        NumericsError: a feature is nan or inf.

    Source: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance
    Discrimination"; DINOv2 uses temperature 0.07 and k 10, 20, 100, 200.
    """
    _check(train_features, train_labels, test_features, ks, temperature)
    train = F.normalize(train_features.float(), dim=1)
    test = F.normalize(test_features.float(), dim=1)
    return _predict(train, train_labels, test, ks, temperature, leave_one_out=False)


def knn_predict_leave_one_out(
    features: Tensor,
    labels: Tensor,
    *,
    ks: Sequence[int] = NEIGHBOR_COUNTS,
    temperature: float = TEMPERATURE,
) -> dict[int, Tensor]:
    """Label of each image by the vote of all the others; see `knn_predict`.

    Args:
        features: [n, C] floating point, n at least 2.
        labels: [n] integers, at least 0.
        ks: neighbours that vote; one larger than n - 1 lets all the others vote.
        temperature: divides the similarities.

    Returns:
        For each k the predicted labels, int64 [n] on the CPU.

    Raises:
        ValueError: shapes, labels, ks or temperature that make no sense.
        NumericsError: a feature is nan or inf.
    """
    _check(features, labels, features, ks, temperature)
    if len(features) < 2:
        raise ValueError("knn: leave-one-out needs at least 2 images, got 1; give a test set")
    unit = F.normalize(features.float(), dim=1)
    return _predict(unit, labels, unit, ks, temperature, leave_one_out=True)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int] = NEIGHBOR_COUNTS,
    temperature: float = TEMPERATURE,
) -> dict[int, float]:
    """Percentage of test images whose label `knn_predict` finds.

    Args:
        train_features: [n, C] floating point.
        train_labels: [n] integers, at least 0.
        test_features: [m, C] on the same device.
        test_labels: [m] integers; one that no training image has counts as an error.
        ks: neighbours that vote.
        temperature: divides the similarities.

    Returns:
        For each k the accuracy in percent.

    Raises:
        ValueError: as `knn_predict`, or no label for each test image.
        NumericsError: a feature is nan or inf.
    """
    if test_labels.shape != (len(test_features),):
        raise ValueError(
            f"knn: test_labels must be [{len(test_features)}], one for each test feature, "
            f"got {tuple(test_labels.shape)}"
        )
    predicted = knn_predict(
        train_features, train_labels, test_features, ks=ks, temperature=temperature
    )
    return _percent(predicted, test_labels)


def nearest_neighbors(train_features: Tensor, test_features: Tensor, count: int) -> Tensor:
    """Training images most similar to each test image by cosine, nearest first.

    Args:
        train_features: [n, C] floating point.
        test_features: [m, C] on the same device.
        count: neighbours wanted, at most n.

    Returns:
        Positions in the training set, int64 [m, count] on the CPU.
    """
    train = F.normalize(train_features.float(), dim=1)
    test = F.normalize(test_features.float(), dim=1)
    parts = [_nearest(test[rows] @ train.T, count)[1] for rows in _chunks(len(test), len(train))]
    return torch.cat(parts)


def evaluate_knn(
    checkpoint: Path,
    *,
    data: Path | None = None,
    train: Path | None = None,
    test: Path | None = None,
    image_px: int | None = None,
    resize_px: int | None = None,
    batch_size: int = 64,
    num_workers: int = -1,
    device: str = "auto",
    precision: str = "fp32",
    ks: Sequence[int] = NEIGHBOR_COUNTS,
) -> dict[str, Any]:
    """k-NN accuracy of a checkpoint's CLS features on labelled folders.

    The label of an image is the name of its first folder below the root. Without a test folder
    every image is classified by all the others.

    Args:
        checkpoint: weight file or run directory.
        data: folder with train/ and test/ (or val/), or one folder of classes.
        train: images that vote, instead of `data`.
        test: images that are classified; None: leave one out.
        image_px: side of the square the network sees; None: see `models.frozen.default_image_px`.
        resize_px: side to which the shorter edge is resized before the centre crop; None: see
            `models.frozen.default_resize_px`.
        batch_size: images per forward.
        num_workers: threads that decode; -1: one for each free core.
        device: auto, cpu, cuda or cuda:N.
        precision: fp32 or bf16.
        ks: neighbours that vote.

    Returns:
        `accuracy` (percent for each k), `best_k`, counts of images and classes, the accuracy of
        always naming the most frequent class (`majority`), sizes, speed, unreadable images.

    Raises:
        ConfigError: folders named in a way that does not fit together.
        DataError: no such folder, no labels, a single class that votes, or none in common.
        CheckpointError: weights that cannot be loaded.
    """
    train_path, test_path = find_folders(data, train, test)
    model = load_model(checkpoint, device=device)
    options: dict[str, Any] = {
        "image_px": image_px,
        "resize_px": resize_px,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "precision": precision,
    }
    train_features = extract_features(model, open_labelled(train_path, min_classes=2), **options)
    test_features = train_features
    if test_path is not None:
        test_features = extract_features(model, open_labelled(test_path), **options)
    split = common_classes(train_features, test_features)
    if test_path is None:
        predicted = knn_predict_leave_one_out(split.train.cls, split.train_labels, ks=ks)
        accuracy = _percent(predicted, split.train_labels)
    else:
        accuracy = knn_accuracy(
            split.train.cls, split.train_labels, split.test.cls, split.test_labels, ks=ks
        )
    return _result(accuracy, split, checkpoint, leave_one_out=test_path is None)


def format_result(result: dict[str, Any]) -> str:
    """The result of `evaluate_knn` as lines for a person."""
    train, test = result["train_images"], result["test_images"]
    voters = f"{train} images vote, {test} are classified"
    if result["leave_one_out"]:
        voters = f"each of {train} images is classified by the others"
    lines = [
        f"k-NN, cosine, temperature {TEMPERATURE}: {voters}, {result['classes']} classes",
        f"images resized to {result['resize_px']} px, centre crop {result['image_px']} px; "
        f"{result['images_per_second']:.0f} images/s",
    ]
    for k, value in result["accuracy"].items():
        best = "  best" if k == result["best_k"] else ""
        all_vote = "  (every training image votes)" if k >= train else ""
        lines.append(f"  k = {k:>4}   {value:6.2f} %{best}{all_vote}")
    lines.append(f"  most frequent class alone: {result['majority']:.2f} %")
    if result["unknown_classes"]:
        names = ", ".join(result["unknown_classes"][:5])
        lines.append(
            f"  {len(result['unknown_classes'])} classes without a training image count as errors: "
            f"{names}"
        )
    lines += [f"  unreadable: {name}: {reason}" for name, reason in result["unreadable"]]
    return "\n".join(lines)


def _check(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    ks: Sequence[int],
    temperature: float,
) -> None:
    if train_features.ndim != 2 or len(train_features) == 0:
        raise ValueError(
            f"knn: train_features must be [n, C], n >= 1, got {tuple(train_features.shape)}"
        )
    if test_features.ndim != 2 or test_features.shape[1] != train_features.shape[1]:
        raise ValueError(
            f"knn: test_features must be [m, {train_features.shape[1]}], "
            f"got {tuple(test_features.shape)}"
        )
    if train_labels.shape != (len(train_features),) or train_labels.is_floating_point():
        raise ValueError(
            f"knn: train_labels must be integers [{len(train_features)}], "
            f"got {train_labels.dtype} {tuple(train_labels.shape)}"
        )
    if int(train_labels.min()) < 0:
        raise ValueError("knn: train_labels must be at least 0; leave out images without a label")
    if not ks or min(ks) < 1:
        raise ValueError(f"knn: ks must be at least 1 and not empty, got {tuple(ks)}")
    if not temperature > 0:
        raise ValueError(f"knn: temperature must be greater than 0, got {temperature}")
    for name, features in (("train", train_features), ("test", test_features)):
        bad = int((~torch.isfinite(features)).any(dim=1).sum())
        if bad:
            raise NumericsError(
                f"knn: {name}_features must be finite, got nan or inf in {bad} of {len(features)} "
                "rows; the weights have diverged, or precision fp32 is needed"
            )


def _predict(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    ks: Sequence[int],
    temperature: float,
    *,
    leave_one_out: bool,
) -> dict[int, Tensor]:
    """The predictions for unit vectors, chunk by chunk."""
    num_kept = min(max(ks), len(train) - leave_one_out)
    labels = train_labels.cpu().long()
    found: list[dict[int, Tensor]] = []
    for rows in _chunks(len(test), len(train)):
        similarity = test[rows] @ train.T  # [chunk, n]
        if leave_one_out:
            own = torch.arange(len(similarity), device=train.device)
            similarity[own, own + rows.start] = -torch.inf
        found.append(_vote(*_nearest(similarity, num_kept), labels, ks, temperature))
    return {k: torch.cat([part[k] for part in found]) for k in ks}


def _chunks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Runs of test rows whose similarities to all training rows fit the memory budget."""
    size = max(1, min(_MAX_CHUNK_ROWS, _MAX_CHUNK_ELEMENTS // num_columns))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _nearest(similarity: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, largest first, equal ones by position; both on the CPU.

    `topk` leaves open which of several equal values it takes, so rows where equal values straddle
    the edge are sorted in full, stably. They are rare: exact duplicates of an image.
    """
    values, indices = similarity.topk(count, dim=1)  # [rows, count]
    edge = values[:, -1:]
    ambiguous = (similarity >= edge).sum(dim=1) > count
    if bool(ambiguous.any()):
        full = similarity[ambiguous].sort(dim=1, descending=True, stable=True)
        values[ambiguous], indices[ambiguous] = full.values[:, :count], full.indices[:, :count]
    by_position = indices.argsort(dim=1)
    values, indices = values.gather(1, by_position), indices.gather(1, by_position)
    order = values.argsort(dim=1, descending=True, stable=True)
    return values.gather(1, order).cpu(), indices.gather(1, order).cpu()


def _vote(
    similarity: Tensor, neighbors: Tensor, labels: Tensor, ks: Sequence[int], temperature: float
) -> dict[int, Tensor]:
    """Predicted labels [rows] for each k; on the CPU, where scatter_add has one order."""
    weights = (similarity.double() / temperature).softmax(dim=1)  # [rows, max k]
    classes = labels[neighbors]
    predicted = {}
    for k in ks:
        votes = weights.new_zeros(len(weights), int(labels.max()) + 1)  # [rows, classes]
        votes.scatter_add_(1, classes[:, :k], weights[:, :k])
        predicted[k] = votes.argmax(dim=1)  # the first of equal votes
    return predicted


def _percent(predicted: dict[int, Tensor], labels: Tensor) -> dict[int, float]:
    truth = labels.cpu()
    return {k: 100.0 * float((p == truth).double().mean()) for k, p in predicted.items()}


def _result(
    accuracy: dict[int, float], split: Split, checkpoint: Path, *, leave_one_out: bool
) -> dict[str, Any]:
    known = set(split.train_labels.tolist())
    unknown = sorted(set(split.test_labels.tolist()) - known)
    most_frequent = int(split.train_labels.bincount().argmax())
    sets = [split.train] if leave_one_out else [split.train, split.test]
    seconds = sum(part.seconds for part in sets)
    images = sum(len(part.names) for part in sets)
    return {
        "checkpoint": str(checkpoint),
        "accuracy": accuracy,
        "best_k": max(accuracy, key=lambda k: (accuracy[k], -k)),
        "majority": 100.0 * float((split.test_labels == most_frequent).double().mean()),
        "train_images": len(split.train_labels),
        "test_images": len(split.test_labels),
        "classes": len(split.class_names),
        "unknown_classes": [split.class_names[index] for index in unknown],
        "leave_one_out": leave_one_out,
        "temperature": TEMPERATURE,
        "image_px": split.train.image_px,
        "resize_px": split.train.resize_px,
        "seconds": round(seconds, 3),
        "images_per_second": round(images / max(seconds, 1e-9), 1),
        "unreadable": [pair for part in sets for pair in part.unreadable],
    }
