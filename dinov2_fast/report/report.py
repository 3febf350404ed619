"""The page a run ends with: what was learned, how it went, what the network sees and finds."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dinov2_fast.data.decoding import decode_image
from dinov2_fast.errors import OutputError
from dinov2_fast.evaluation.knn import nearest_neighbors
from dinov2_fast.report import page, pictures, plots
from dinov2_fast.report.pca import pca_rgb
from dinov2_fast.report.run_facts import config_differences, environment_facts

if TYPE_CHECKING:
    from PIL import Image

    from dinov2_fast.config import Config
    from dinov2_fast.data.collate import Batch
    from dinov2_fast.data.image_source import ImageSource
    from dinov2_fast.features import Features
    from dinov2_fast.models.vision_transformer import VisionTransformer

NUM_CROP_IMAGES = 5
"""Images of the first batch whose crops are shown, each of another class."""
NUM_QUERIES = 8
"""Test images whose neighbours are shown."""
NUM_NEIGHBORS = 5
_CROP_PX = 88
_NEIGHBOR_PX = 68
_COMPONENT_PX = 144

_LOSSES = (
    ("loss", "Total loss", "What is optimised: the weighted sum of the parts."),
    ("dino", "DINO", "Image level: CLS token of one crop against the teacher's of another."),
    ("ibot", "iBOT", "Patch level: masked patches against the teacher's unmasked view."),
    ("koleo", "KoLeo", "Spread of the features in a batch; falls as images move apart."),
    ("lr", "Learning rate", "Warm-up, then cosine."),
)


@dataclass(frozen=True)
class Accuracy:
    """k-NN accuracy of one kind of features."""

    name: str
    """What the features are."""
    percent: float
    """With the features the protocol uses: CLS tokens, or all pixels."""
    patch_mean_percent: float | None = None
    """With the mean of the patch tokens."""


@dataclass(frozen=True)
class ReportContents:
    """Everything a report shows."""

    title: str
    """Heading of the page."""
    subtitle: str
    """One sentence below it."""
    config: Config
    """Settings of the run."""
    model: VisionTransformer
    """The trained backbone."""
    accuracies: Sequence[Accuracy]
    """From the weakest baseline to the trained network, which is the last."""
    k: int
    """Neighbours that voted."""
    metrics: Sequence[Mapping[str, Any]]
    """Records of metrics.jsonl."""
    train_source: ImageSource
    """Images that were trained on."""
    test_source: ImageSource
    """Images that were classified."""
    train: Features
    """Of `model` over `train_source`."""
    test: Features
    """Of `model` over `test_source`."""
    batch: Batch
    """The first batch of the run."""
    pca_images: Mapping[str, Image.Image]
    """Name -> picture for the components of patch features."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further lines of the table about the run."""


def build_report(out: Path, contents: ReportContents) -> Path:
    """Write OUT/report.html: one file that loads nothing and can be sent by mail.

    Args:
        out: folder.
        contents: what to show.

    Returns:
        The file.

    Raises:
        OutputError: it cannot be written.
    """
    sections = [
        ("result", "Result", _result(contents)),
        ("curves", "Training", _curves(contents.metrics)),
        ("crops", "Crops and masks", _crops(contents)),
        ("components", "Patch features", _components(contents)),
        ("neighbors", "Nearest neighbours", _neighbors(contents)),
        ("run", "The run", _run(contents)),
    ]
    target = out / "report.html"
    temporary = out / f".report.{os.getpid()}.tmp"
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page.page(contents.title, contents.subtitle, sections), "utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"report: cannot write {target}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return target


def _result(contents: ReportContents) -> str:
    final = contents.accuracies[-1]
    num_test, num_classes = len(contents.test.names), len(contents.train.class_names)
    share = final.percent / 100
    error = 100 * math.sqrt(share * (1 - share) / max(num_test, 1))
    rows = [
        (
            accuracy.name,
            f"{accuracy.percent:.1f} %",
            "" if accuracy.patch_mean_percent is None else f"{accuracy.patch_mean_percent:.1f} %",
        )
        for accuracy in contents.accuracies
    ]
    last = len(rows) - 1
    table = page.table(rows, head=("features", "all pixels / CLS", "patch mean"), emphasized=last)
    bars = plots.bar_chart(
        "k-NN accuracy",
        [
            plots.Bar(accuracy.name, accuracy.percent, emphasized=index == last)
            for index, accuracy in enumerate(contents.accuracies)
        ],
        unit="%",
        highest=100.0,
    )
    words = (
        f"{num_test} test images of {num_classes} classes are named by the vote of their "
        f"{contents.k} nearest among {len(contents.train.names)} training images, by cosine "
        f"similarity of the features. No label was used in training. Guessing gives "
        f"{100 / max(num_classes, 1):.1f} %; one standard error of the last figure is "
        f"{error:.1f} points."
    )
    return page.paragraph(words) + page.columns([f"<div>{table}</div>", f"<div>{bars}</div>"])


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    charts = []
    for key, name, meaning in _LOSSES:
        points = [(record["step"], record.get(key)) for record in metrics if key in record]
        svg = plots.line_chart(f"{name} by step", [plots.Curve(name, points)])
        charts.append(page.chart(svg, name, caption=meaning))
    return page.columns(charts)


def _crops(contents: ReportContents) -> str:
    """The images of the first batch with the crops and masks drawn for them."""
    batch, patch_size = contents.batch, contents.model.patch_size
    num_images = len(batch.sample_indices)  # B
    num_local = len(batch.local_crops) // num_images
    side = batch.global_crops.shape[-1] // patch_size
    groups = []
    for i in _of_different_classes(contents.train_source, batch.sample_indices.tolist()):
        original = _read(contents.train_source, int(batch.sample_indices[i]))
        shown = [
            page.picture(
                original,
                alt="stored image",
                width_px=_CROP_PX,
                caption="image",
                classes="query",
            )
        ]
        for view in range(2):
            crop = batch.global_crops[view * num_images + i]  # [3, H, W], crop-major
            mask = batch.masks[view * num_images + i]
            name = f"global {view + 1}"
            if bool(mask.any()):
                name += f", {100 * float(mask.float().mean()):.0f} % masked"
            shaded = pictures.shade_masked(pictures.to_picture(crop), mask, (side, side))
            shown.append(page.picture(shaded, alt=name, width_px=_CROP_PX, caption=name))
        for local in range(num_local):
            picture = pictures.to_picture(batch.local_crops[local * num_images + i])
            width = round(_CROP_PX * picture.width / batch.global_crops.shape[-1])
            name = f"local {local + 1}"
            shown.append(page.picture(picture, alt=name, width_px=max(width, 40), caption=name))
        groups.append(f'<div class="group">{page.strip(shown)}</div>')
    words = (
        "The first batch, exactly as the networks got it. The student sees every crop, and of the "
        "global ones not the shaded patches; the teacher sees both global crops whole. The student "
        "has to say what the teacher says."
    )
    return page.paragraph(words) + "".join(groups)


def _components(contents: ReportContents) -> str:
    """Principal components of patch features as colours, with and without background."""
    patch_size, images = contents.model.patch_size, list(contents.pca_images.values())
    if not images:
        return page.paragraph("No pictures were given.")
    tokens = patch_tokens(contents.model, images)  # [B, N, C]
    grid = images[0].height // patch_size, images[0].width // patch_size
    whole, _ = pca_rgb(tokens, grid, remove_background=False)
    colors, foreground = pca_rgb(tokens, grid)
    groups = []
    for index, (name, image) in enumerate(contents.pca_images.items()):
        share = 100 * float(foreground[index].float().mean())
        shown = [
            (image, name),
            (pictures.component_picture(whole[index]), "all patches"),
            (pictures.component_picture(colors[index]), f"foreground ({share:.0f} %)"),
        ]
        trio = (
            page.picture(picture, alt=f"{name}: {caption}", width_px=_COMPONENT_PX, caption=caption)
            for picture, caption in shown
        )
        groups.append(page.strip(trio, wrap=False))
    words = (
        "Three principal components of the patch features as red, green and blue, one square a "
        "patch. The axes are shared by all pictures, so equal colours mean equal features. In the "
        "right column a first component separates foreground (positive score) from background, "
        "turned so that the borders of the pictures tend to be background, and a second analysis "
        "colours the foreground alone: the recipe of the DINOv2 paper."
    )
    return page.paragraph(words) + page.columns(groups, wide=True)


def _neighbors(contents: ReportContents) -> str:
    """Evenly spaced test images with their nearest training images."""
    train, test = contents.train, contents.test
    count = min(NUM_QUERIES, len(test.names))
    queries = [round((2 * i + 1) * len(test.names) / (2 * count) - 0.5) for i in range(count)]
    num_neighbors = min(NUM_NEIGHBORS, len(train.names))
    found = nearest_neighbors(train.cls, test.cls[queries], num_neighbors)
    train_index, test_index = (
        _index_of_names(contents.train_source),
        _index_of_names(contents.test_source),
    )
    groups, num_right = [], 0
    for query, neighbors in zip(queries, found.tolist(), strict=True):
        truth = _class_name(test, query)
        image = _read(contents.test_source, test_index[test.names[query]])
        shown = [
            page.picture(
                pictures.thumbnail(image, 2 * _NEIGHBOR_PX),
                alt=f"test image of {truth}",
                width_px=_NEIGHBOR_PX,
                caption=truth,
                classes="query",
            )
        ]
        for position in neighbors:
            name = _class_name(train, position)
            right = name == truth
            num_right += right
            image = _read(contents.train_source, train_index[train.names[position]])
            shown.append(
                page.picture(
                    pictures.thumbnail(image, 2 * _NEIGHBOR_PX),
                    alt=f"{'right' if right else 'wrong'} neighbour, {name}",
                    width_px=_NEIGHBOR_PX,
                    caption=name,
                    classes="right" if right else "wrong",
                )
            )
        groups.append(f'<div class="group">{page.strip(shown, wrap=False)}</div>')
    words = (
        f"{count} test images, evenly spaced over the test set and not chosen, each with the "
        f"{num_neighbors} training images whose features are nearest. A solid green frame is the "
        f"right class, a dashed red one a wrong class: {num_right} of {count * num_neighbors} "
        "are right."
    )
    return page.paragraph(words) + page.columns(groups, wide=True)


def _run(contents: ReportContents) -> str:
    """Where and with what the run was made, and every setting that is not a default."""
    parameters = sum(parameter.numel() for parameter in contents.model.parameters())
    facts = {
        **contents.facts,
        "Backbone": f"{parameters:,} parameters, patch {contents.model.patch_size} px",
        **environment_facts(),
    }
    settings = config_differences(contents.config)
    return (
        page.table(facts.items(), num_text_columns=2)
        + "<h3>Settings that differ from the defaults</h3>"
        + page.table(settings, head=("setting", "this run", "default"), num_text_columns=3)
    )


@torch.no_grad()
def patch_tokens(model: VisionTransformer, images: Sequence[Image.Image]) -> Tensor:
    """Normalised patch tokens of pictures of one size.

    Args:
        model: the backbone; used in evaluation mode.
        images: RGB, sides multiples of the patch size, all the same.

    Returns:
        [B, N, C] fp32 on the CPU.
    """
    from dinov2_fast.data.augmentation import evaluation_transform

    was_training = model.training
    model.eval()
    tokens = []
    for image in images:
        shorter = min(image.size)
        pieces = evaluation_transform(shorter, shorter)(image)
        features = model.forward_features(pieces[None].to(model.cls_token.device))
        tokens.append(features["x_norm_patchtokens"].float().cpu())
    model.train(was_training)
    return torch.cat(tokens)


def _of_different_classes(source: ImageSource, indices: Sequence[int]) -> list[int]:
    """Positions of the first images of a batch that add a class; any images without classes."""
    labels = [source.label(index) for index in indices]
    first = [i for i, label in enumerate(labels) if label is None or label not in labels[:i]]
    return first[:NUM_CROP_IMAGES]


def _read(source: ImageSource, index: int) -> Image.Image:
    return decode_image(source.read(index))


def _index_of_names(source: ImageSource) -> dict[str, int]:
    return {source.name(index): index for index in range(len(source))}


def _class_name(features: Features, position: int) -> str:
    label = int(features.labels[position])
    return features.class_names[label] if label >= 0 else "no label"
