"""The whole path on real photographs, offline: images, training, k-NN before and after, report."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_fast.config import Config, load_config
from dinov2_fast.data.photo_crops import CropSettings
from dinov2_fast.errors import OutputError, UserError

if TYPE_CHECKING:
    from PIL import Image

    from dinov2_fast.data.image_source import ImageSource
    from dinov2_fast.features import Features
    from dinov2_fast.models.vision_transformer import VisionTransformer

PRESET = "demo"
NUM_NEIGHBORS = 20
"""k of the vote, fixed beforehand; nothing is chosen on the test crops."""

# Photographs inside the scikit-image package; its other pictures are drawings or scanned text.
PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "clock": "clock_motion.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
CROPS = CropSettings(train_per_photo=120, test_per_photo=40)

_SHOWN_WHOLE = ("astronaut", "cat", "coffee", "motorcycle")
_SHOWN_PX = 256


@dataclass(frozen=True)
class ImageSet:
    """Labelled images on disk in two parts."""

    train: ImageSource
    """What the network trains on, and what votes."""
    test: ImageSource
    """What is classified."""
    num_photographs: int
    """Classes; in the demo one photograph is one class."""


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train on crops of real photographs and report what was learned; needs no network.

    Writes OUT/images, OUT/run (a run directory like any other), OUT/summary.json and
    OUT/report.html. The same command again goes on where it was stopped.

    Args:
        out: folder.
        seed: of everything random, the places of the crops included.
        steps: optimizer steps instead of the preset's.
        overrides: further settings, dotted, as in `{"run.batch_size": 32}`.

    Returns:
        What summary.json holds: `knn_raw_pixels`, `knn_untrained` and `knn_trained` in percent,
        `seconds` of the whole demo, `images_per_second` of training, and what else was measured.

    Raises:
        UserError: scikit-image is missing, or what training can raise.
    """
    start = time.perf_counter()
    photographs = find_photographs()
    config = _config(out, seed, steps, overrides)
    _claim_images(out, seed)
    from dinov2_fast.data.loader import start_fork_server

    if config.data.num_workers:
        start_fork_server()  # its imports run while the images are cut and measured
    images = _make_images(photographs, out, seed)
    print(
        f"{images.num_photographs} photographs cut into {len(images.train)} training crops (left "
        f"part) and {len(images.test)} test crops (right part): {out / 'images'}",
        flush=True,
    )
    from dinov2_fast.train.trainer import train

    before = measure_before(config, images)
    print(
        f"before training, k-NN accuracy: raw pixels {before['knn_raw_pixels']:.1f} %, "
        f"untrained network {before['knn_untrained']:.1f} %",
        flush=True,
    )
    run = train(config, out / "run")
    if not run.get("finished"):
        raise UserError(f"demo: training stopped at step {run['steps']}; run it again to go on")
    model = _load(out)
    train_features, test_features = features_of(model, images)
    summary = {
        **before,
        **accuracies("trained", train_features, test_features),
        "k": NUM_NEIGHBORS,
        "photographs": images.num_photographs,
        "train_images": len(images.train),
        "test_images": len(images.test),
        "chance": 100.0 / images.num_photographs,
        "seed": seed,
        "steps": run["steps"],
        "parameters": run["parameters"]["backbone"],
        "train_seconds": run["seconds"],
        "images_per_second": run["images_per_second"],
    }
    summary["seconds"] = round(time.perf_counter() - start, 1)
    report = _write_report(
        out, config, model, images, (train_features, test_features), summary, photographs
    )
    summary["seconds"] = round(time.perf_counter() - start, 1)
    summary["report"] = str(report)
    _write_summary(out, summary)
    print(format_summary(summary), flush=True)
    return summary


def find_photographs() -> dict[str, Path]:
    """The photographs inside the installed scikit-image; nothing is imported or downloaded.

    Returns:
        Class name -> file.

    Raises:
        UserError: scikit-image is not installed, or holds other files than the known releases.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "demo: its photographs are those of scikit-image, which is not installed; "
            "pip install 'dinov2_fast[demo]'"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    found = {name: folder / file for name, file in PHOTOGRAPHS.items()}
    missing = [path.name for path in found.values() if not path.is_file()]
    if missing:
        raise UserError(
            f"demo: this release of scikit-image has no {', '.join(missing)} in {folder}; "
            "pip install 'scikit-image>=0.22'"
        )
    return found


def format_summary(summary: dict[str, Any]) -> str:
    """The result for a person; the last line is the path of the report."""
    rows = [
        ("raw pixels", summary["knn_raw_pixels"]),
        ("untrained network", summary["knn_untrained"]),
        ("trained network", summary["knn_trained"]),
    ]
    lines = [
        f"k-NN accuracy, k = {summary['k']}, {summary['test_images']} test crops of "
        f"{summary['photographs']} photographs, chance {summary['chance']:.1f} %:",
        *(f"  {name:<18} {value:5.1f} %" for name, value in rows),
        f"{summary['seconds']:.0f} s in all, {summary['images_per_second']:.0f} images/s trained",
        f"{summary['report']}",
    ]
    return "\n".join(lines)


def _config(out: Path, seed: int, steps: int | None, overrides: dict[str, Any] | None) -> Config:
    changes: dict[str, Any] = {
        "data.path": str(out / "images" / "train"),
        "run.seed": seed,
        **(overrides or {}),
    }
    if steps is not None:
        changes["schedule.total_steps"] = steps
    return load_config(PRESET, changes)


def _claim_images(out: Path, seed: int) -> None:
    """Refuse a folder whose images this demo did not make: it would write over them."""
    folder, saved = out / "images", out / "run" / "config.yaml"
    claim = folder / "demo.json"
    earlier = seed
    if claim.is_file():
        earlier = _claimed_seed(claim)
    elif saved.is_file():
        earlier = load_config(str(saved)).run.seed
    elif folder.exists() and any(folder.iterdir()):
        raise OutputError(f"demo: {folder} holds files that no demo made; choose another --out")
    if earlier != seed:
        raise OutputError(f"demo: {out} holds one with seed {earlier}; choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim.write_text(json.dumps({"seed": seed}) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"demo: cannot write {folder}: {error.strerror}") from error


def _claimed_seed(claim: Path) -> int:
    try:
        return int(json.loads(claim.read_text(encoding="utf-8"))["seed"])
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"demo: {claim} does not say which seed its images have; choose another --out"
        ) from error


def _make_images(photographs: dict[str, Path], out: Path, seed: int) -> ImageSet:
    from dinov2_fast.data.datasets import open_images
    from dinov2_fast.data.photo_crops import write_photo_crops

    folder = out / "images"
    try:
        write_photo_crops(photographs, folder, settings=CROPS, seed=seed)
    except OSError as error:
        raise OutputError(f"demo: cannot write {folder}: {error.strerror}") from error
    return ImageSet(
        train=open_images(folder / "train"),
        test=open_images(folder / "test"),
        num_photographs=len(photographs),
    )


def measure_before(config: Config, images: ImageSet) -> dict[str, float]:
    """k-NN accuracy of raw pixels and of the network at step 0, the one training starts from.

    Args:
        config: of the run.
        images: training and test part.

    Returns:
        In percent: `knn_raw_pixels`, `knn_untrained`, `knn_untrained_patch_mean`.
    """
    from dinov2_fast.features import pixel_features
    from dinov2_fast.models.frozen import default_image_px
    from dinov2_fast.train.student_teacher import build_student_teacher

    pair = build_student_teacher(
        config.model,
        config.loss,
        config.crops,
        recipe=config.recipe,
        seed=config.run.seed,
        device="cpu",
    )
    untrained = pair.teacher.backbone
    px = default_image_px(untrained)
    raw = (pixel_features(source, image_px=px) for source in (images.train, images.test))
    pixels = accuracies("raw_pixels", *raw)
    return {
        "knn_raw_pixels": pixels["knn_raw_pixels"],
        **accuracies("untrained", *features_of(untrained, images)),
    }


def _load(out: Path) -> VisionTransformer:
    from dinov2_fast.models.frozen import load_model

    return load_model(out / "run", device="cpu")


def features_of(model: VisionTransformer, images: ImageSet) -> tuple[Features, Features]:
    """Features of the training and of the test part."""
    from dinov2_fast.features import extract_features

    return extract_features(model, images.train), extract_features(model, images.test)


def accuracies(name: str, train: Features, test: Features) -> dict[str, float]:
    """k-NN accuracy in percent with CLS features and with the mean of the patches."""
    from dinov2_fast.evaluation.knn import knn_accuracy

    ks = (NUM_NEIGHBORS,)
    return {
        f"knn_{name}{suffix}": knn_accuracy(a, train.labels, b, test.labels, ks=ks)[NUM_NEIGHBORS]
        for suffix, a, b in (
            ("", train.cls, test.cls),
            ("_patch_mean", train.patch_mean, test.patch_mean),
        )
    }


def _write_report(
    out: Path,
    config: Config,
    model: VisionTransformer,
    images: ImageSet,
    features: tuple[Features, Features],
    summary: dict[str, Any],
    photographs: dict[str, Path],
) -> Path:
    from dinov2_fast.data.loader import BatchBuilder
    from dinov2_fast.report.report import Accuracy, ReportContents, build_report
    from dinov2_fast.train.metrics import read_metrics

    builder = BatchBuilder(
        images.train,
        crops=config.crops,
        masks=config.masks,
        patch_size=model.patch_size,
        recipe=config.recipe,
        seed=config.run.seed,
        batch_size=config.run.batch_size,
        rank=0,
        world_size=1,
        max_pixels=config.data.max_pixels,
    )
    rows = [Accuracy("raw pixels", summary["knn_raw_pixels"])]
    rows += [
        Accuracy(f"{name} network", summary[f"knn_{name}"], summary[f"knn_{name}_patch_mean"])
        for name in ("untrained", "trained")
    ]
    contents = ReportContents(
        title="DINOv2 from scratch on a few photographs",
        subtitle=(
            f"A vision transformer of {summary['parameters'] / 1e3:.0f} thousand parameters, "
            f"trained without labels for {summary['train_seconds']:.0f} s on crops of "
            f"{summary['photographs']} photographs."
        ),
        config=config,
        model=model,
        accuracies=rows,
        k=NUM_NEIGHBORS,
        metrics=read_metrics(out / "run" / "metrics.jsonl"),
        train_source=images.train,
        test_source=images.test,
        train=features[0],
        test=features[1],
        batch=builder.build(0),
        pca_images={name: _square(photographs[name], model) for name in _SHOWN_WHOLE},
        facts={
            "Images": f"crops of the photographs that scikit-image ships; a class is a photograph. "
            f"{summary['train_images']} training crops from the left 55 %, "
            f"{summary['test_images']} test crops from the right 40 %: no pixel is in both.",
            "Training": f"{summary['steps']} steps of {config.run.batch_size} images, "
            f"{summary['train_seconds']:.0f} s, {summary['images_per_second']:.0f} images/s",
            "Whole demo": f"{summary['seconds']:.0f} s",
            "Seed": str(summary["seed"]),
        },
    )
    return build_report(out, contents)


def _square(path: Path, model: VisionTransformer) -> Image.Image:
    """The middle of a photograph, its side a multiple of the patch size."""
    from dinov2_fast.data.decoding import decode_image
    from dinov2_fast.report.pictures import center_crop

    side = _SHOWN_PX // model.patch_size * model.patch_size
    return center_crop(decode_image(path.read_bytes()), side, side)


def _write_summary(out: Path, summary: dict[str, Any]) -> None:
    from dinov2_fast.train.run_directory import output_errors, write_atomic

    with output_errors(out):
        write_atomic(out / "summary.json", json.dumps(summary, indent=1) + "\n")
