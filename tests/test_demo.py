from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_fast import demo
from dinov2_fast.config import load_config
from dinov2_fast.data.datasets import open_images
from dinov2_fast.data.photo_crops import CropSettings
from dinov2_fast.errors import OutputError, UserError
from dinov2_fast.train.student_teacher import build_student_teacher

needs_scikit_image = pytest.mark.skipif(
    importlib.util.find_spec("skimage") is None, reason="scikit-image is not installed"
)

# The whole path in seconds: few crops, few prototypes, a handful of steps.
TINY = {
    "schedule.total_steps": 3,
    "run.batch_size": 4,
    "run.num_threads": 1,
    "run.device": "cpu",
    "data.num_workers": 0,
    "crops.num_local": 2,
}


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Small pictures in place of scikit-image's, so that the test needs no extra."""
    rng = np.random.default_rng(0)
    found = {}
    for name in demo.PHOTOGRAPHS:
        pixels = rng.integers(0, 256, (20, 40, 3), dtype=np.uint8)
        found[name] = tmp_path / "photos" / f"{name}.png"
        found[name].parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((300, 150)).save(found[name])
    monkeypatch.setattr(demo, "find_photographs", lambda: found)
    monkeypatch.setattr(demo, "CROPS", CropSettings(train_per_photo=4, test_per_photo=2))
    return found


@pytest.fixture
def finished(photographs, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The demo's folder, its result and what it printed."""
    summary = demo.run_demo(tmp_path / "out", seed=1, overrides=TINY)
    return tmp_path / "out", summary, capsys.readouterr().out


def test_the_demo_leaves_images_a_run_a_summary_and_a_report(finished):
    out, summary, printed = finished
    assert len(open_images(out / "images" / "train")) == 4 * len(demo.PHOTOGRAPHS)
    assert len(open_images(out / "images" / "test")) == 2 * len(demo.PHOTOGRAPHS)
    assert (out / "run" / "teacher.safetensors").is_file()
    assert json.loads((out / "summary.json").read_text()) == summary
    for key in ("knn_raw_pixels", "knn_untrained", "knn_trained"):
        assert 0 <= summary[key] <= 100
        assert f"{summary[key]:.1f} %" in printed
    assert summary["seconds"] > 0
    assert summary["images_per_second"] > 0
    assert summary["steps"] == 3
    assert printed.rstrip().splitlines()[-1] == str(out / "report.html")
    assert (out / "report.html").stat().st_size > 10_000


def test_the_untrained_network_is_the_one_training_starts_from(finished):
    from dinov2_fast.evaluation.knn import knn_accuracy
    from dinov2_fast.features import extract_features

    out, summary, _ = finished
    config = load_config("demo", {**TINY, "run.seed": 1})
    pair = build_student_teacher(
        config.model, config.loss, config.crops, recipe=config.recipe, seed=1, device="cpu"
    )
    train, test = (
        extract_features(pair.student.backbone, open_images(out / "images" / part))
        for part in ("train", "test")
    )
    accuracy = knn_accuracy(train.cls, train.labels, test.cls, test.labels, ks=(20,))[20]
    assert summary["knn_untrained"] == accuracy


def test_the_trained_figure_is_that_of_the_teacher_as_the_evaluation_command_finds_it(finished):
    from dinov2_fast.evaluation.knn import evaluate_knn

    out, summary, _ = finished
    result = evaluate_knn(out / "run", data=out / "images", num_workers=0, device="cpu")
    assert result["accuracy"][demo.NUM_NEIGHBORS] == summary["knn_trained"]


def test_the_same_command_again_trains_nothing_and_finds_the_same(finished, photographs):
    out, summary, _ = finished
    again = demo.run_demo(out, seed=1, overrides=TINY)
    for key in ("knn_raw_pixels", "knn_untrained", "knn_trained", "steps"):
        assert again[key] == summary[key]


def test_another_seed_in_the_same_folder_is_refused_and_changes_no_image(finished, photographs):
    out, _, _ = finished
    image = out / "images" / "train" / "moon" / "000.png"
    before = image.read_bytes()
    with pytest.raises(OutputError, match="seed 1"):
        demo.run_demo(out, seed=2, overrides=TINY)
    assert image.read_bytes() == before


def test_a_folder_of_own_images_is_refused_and_left_as_it_is(photographs, tmp_path: Path):
    own = tmp_path / "out" / "images" / "train" / "moon" / "000.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"my picture")
    with pytest.raises(OutputError, match="choose another --out"):
        demo.run_demo(tmp_path / "out", overrides=TINY)
    assert own.read_bytes() == b"my picture"
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [own]


def test_a_demo_stopped_among_its_images_goes_on_with_its_seed_alone(photographs, tmp_path: Path):
    demo._claim_images(tmp_path, 1)  # what is left when it stops before the first image
    with pytest.raises(OutputError, match="seed 1"):
        demo.run_demo(tmp_path, seed=2, overrides=TINY)
    assert demo.run_demo(tmp_path, seed=1, overrides=TINY)["steps"] == 3
    (tmp_path / "images" / "demo.json").write_text("{}")
    with pytest.raises(OutputError, match="which seed"):
        demo.run_demo(tmp_path, seed=1, overrides=TINY)


def test_without_scikit_image_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dinov2_fast\[demo\]'"):
        demo.find_photographs()


@needs_scikit_image
def test_the_photographs_are_inside_the_package_and_need_no_download(
    monkeypatch: pytest.MonkeyPatch,
):
    import socket

    def refuse(*arguments):
        raise AssertionError("the demo must not use the network")

    monkeypatch.setattr(socket, "socket", refuse)
    found = demo.find_photographs()
    assert len(found) == len(demo.PHOTOGRAPHS)
    for path in found.values():
        with Image.open(path) as image:
            # The parts must be wide enough for the largest crop.
            scale = demo.CROPS.photo_px / min(image.size)
            assert int(image.width * 0.4) * scale >= demo.CROPS.max_px


def test_the_preset_is_small_enough_for_two_cores():
    config = load_config("demo")
    pair = build_student_teacher(
        config.model, config.loss, config.crops, recipe=config.recipe, seed=0, device="meta"
    )
    assert sum(p.numel() for p in pair.student.backbone.parameters()) <= 300_000


@needs_scikit_image
@pytest.mark.slow
def test_training_on_the_real_photographs_beats_the_untrained_network(tmp_path: Path):
    summary = demo.run_demo(tmp_path, seed=0)
    assert summary["knn_trained"] >= summary["knn_untrained"] + 10
    assert summary["knn_trained"] > summary["knn_raw_pixels"]
