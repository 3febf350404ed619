from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_fast.config import Config, to_yaml
from dinov2_fast.data.datasets import open_images
from dinov2_fast.errors import CheckpointError, ConfigError, DataError, OutputError
from dinov2_fast.features import (
    NO_LABEL,
    Features,
    embed,
    extract_features,
    pixel_features,
)
from dinov2_fast.models.frozen import (
    default_image_px,
    default_resize_px,
    find_weights,
    load_model,
    resolve_device,
)
from dinov2_fast.models.presets import create_model
from dinov2_fast.models.pretrained import convert_file, save_backbone
from tests.tolerance import assert_within_error_budget


@pytest.fixture
def model():
    return create_model("debug", image_px=28, layer_scale=1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven pictures of different sizes in two classes, and one file that is none."""
    rng = np.random.default_rng(0)
    for i in range(11):
        target = tmp_path / "images" / ("ant" if i % 2 else "bee")
        target.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (30 + i, 40 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(target / f"{i:02d}.png")
    (tmp_path / "images" / "ant" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    return tmp_path / "images"


def _equal(a: Features, b: Features) -> bool:
    tensors = all(
        torch.equal(getattr(a, key), getattr(b, key)) for key in ("cls", "patch_mean", "labels")
    )
    rest = all(
        getattr(a, key) == getattr(b, key)
        for key in ("names", "class_names", "unreadable", "image_px", "resize_px")
    )
    return tensors and rest


def test_features_are_those_of_the_model_on_each_image(model, folder: Path):
    from dinov2_fast.data.augmentation import evaluation_transform
    from dinov2_fast.data.decoding import decode_image

    source = open_images(folder)
    features = extract_features(model, source, image_px=28, resize_px=32, num_workers=2)
    transform = evaluation_transform(28, 32)
    readable = [i for i in range(len(source)) if "broken" not in source.name(i)]
    assert features.names == [source.name(i) for i in readable]
    images = torch.stack([transform(decode_image(source.read(i))) for i in readable])
    with torch.no_grad():
        tokens = model.eval().forward_features(images)
        truth = model.double().forward_features(images.double())
    assert_within_error_budget(
        features.cls,
        low_precision=tokens["x_norm_clstoken"],
        truth=truth["x_norm_clstoken"],
        name="cls",
    )
    assert_within_error_budget(
        features.patch_mean,
        low_precision=tokens["x_norm_patchtokens"].mean(1),
        truth=truth["x_norm_patchtokens"].mean(1),
        name="patch mean",
    )


def test_labels_follow_the_folders_and_broken_images_are_reported(model, folder: Path):
    features = extract_features(model, open_images(folder), num_workers=2)
    assert len(features.cls) == len(features.patch_mean) == len(features.names) == 11
    folders = [Path(name).parent.name for name in features.names]
    assert [features.class_names[label] for label in features.labels.tolist()] == folders
    assert [Path(name).name for name, reason in features.unreadable if reason] == ["broken.jpg"]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_number_of_threads_changes_no_bit(model, folder: Path, num_workers: int):
    source = open_images(folder)
    plain = extract_features(model, source, batch_size=3, num_workers=0)
    assert _equal(plain, extract_features(model, source, batch_size=3, num_workers=num_workers))


def test_threads_end_with_the_call_and_warning_filters_stay(model, folder: Path):
    before, filters = threading.active_count(), list(warnings.filters)
    extract_features(model, open_images(folder), num_workers=3, batch_size=2)
    for thread in threading.enumerate():
        if thread.name.startswith("decode"):
            thread.join(timeout=5)
    assert threading.active_count() == before
    assert list(warnings.filters) == filters


def test_mode_and_gradients_of_the_model_are_left_as_they_were(model, folder: Path):
    model.train()
    features = extract_features(model, open_images(folder), num_workers=0)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not features.cls.requires_grad
    assert not features.cls.is_inference()  # a probe may be trained on them


def test_stochastic_depth_is_off_even_for_a_model_in_training(folder: Path):
    model = create_model("debug", image_px=28, layer_scale=1.0, drop_ratio=0.5).train()
    source = open_images(folder)
    assert _equal(extract_features(model, source), extract_features(model, source))


def test_bf16_features_are_close_and_stored_as_fp32(model, folder: Path):
    source = open_images(folder)
    full = extract_features(model, source, num_workers=0)
    half = extract_features(model, source, num_workers=0, precision="bf16")
    assert half.cls.dtype == torch.float32
    assert not torch.equal(half.cls, full.cls)
    similarity = torch.nn.functional.cosine_similarity(half.cls, full.cls)
    assert bool((similarity > 1 - 2**-8).all())  # one unit of bf16 in the direction


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_px": 30}, "multiple of the patch size 14"),
        ({"image_px": 0}, "image_px"),
        ({"image_px": 28, "resize_px": 20}, "resize_px 20"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_workers": -2}, "num_workers must be at least -1, got -2"),
        ({"precision": "fp8"}, "fp32 or bf16"),
    ],
)
def test_settings_that_make_no_sense_are_refused(model, folder: Path, settings, words: str):
    with pytest.raises(ConfigError, match=words):
        extract_features(model, open_images(folder), **settings)


def test_a_source_without_readable_images_is_an_error_with_a_reason(model, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of 1 images.*a\.png.*empty"):
        extract_features(model, open_images(tmp_path), num_workers=1)


def test_images_with_too_many_pixels_are_reported(model, folder: Path):
    features = extract_features(model, open_images(folder), max_pixels=1200, num_workers=0)
    big = {name for name, reason in features.unreadable if "1200" in reason}
    # Picture i has (40 - i) x (30 + i) pixels: 1200 at i = 0 and i = 10, more in between.
    assert sorted(Path(name).stem for name in big) == [f"{i:02d}" for i in range(1, 10)]


def test_pixel_features_are_the_normalised_pixels(folder: Path):
    from dinov2_fast.data.augmentation import evaluation_transform

    source = open_images(folder)
    features = pixel_features(source, image_px=8, num_workers=2)
    first = Image.open(features.names[0]).convert("RGB")
    assert torch.equal(features.cls[0], evaluation_transform(8, 8)(first).flatten())
    assert features.patch_mean.shape == (11, 3)


def test_saved_features_come_back_equal(model, folder: Path, tmp_path: Path):
    features = extract_features(model, open_images(folder))
    target = tmp_path / "new" / "features.safetensors"
    features.save(target)
    assert _equal(Features.load(target), features)
    assert sorted(path.name for path in target.parent.iterdir()) == [
        "features.json",
        "features.safetensors",
    ]


def test_names_of_any_bytes_survive_saving(model, tmp_path: Path):
    source_folder = tmp_path / "in"
    source_folder.mkdir()
    name = b"\xff<b>\n.png".decode("utf-8", "surrogateescape")
    Image.new("RGB", (20, 20)).save(source_folder / name)
    features = extract_features(model, open_images(source_folder))
    features.save(tmp_path / "f.safetensors")
    assert [Path(n).name for n in Features.load(tmp_path / "f.safetensors").names] == [name]
    assert features.labels.tolist() == [NO_LABEL]


def test_a_pair_of_files_that_do_not_belong_together_is_refused(
    model, folder: Path, tmp_path: Path
):
    features = extract_features(model, open_images(folder))
    target = tmp_path / "f.safetensors"
    features.save(target)
    record = json.loads(target.with_suffix(".json").read_text())
    record["names"].pop()
    target.with_suffix(".json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="different runs"):
        Features.load(target)
    target.with_suffix(".json").unlink()
    with pytest.raises(DataError, match=r"f\.safetensors"):
        Features.load(target)


def test_a_damaged_features_file_is_refused(model, folder: Path, tmp_path: Path):
    target = tmp_path / "f.safetensors"
    extract_features(model, open_images(folder)).save(target)
    target.write_bytes(target.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"f\.safetensors"):
        Features.load(target)


def test_labelled_leaves_out_images_without_a_label(model, folder: Path):
    Image.new("RGB", (20, 20)).save(folder / "loose.png")
    features = extract_features(model, open_images(folder))
    labelled = features.labelled()
    assert len(features.names) == 12
    assert len(labelled.names) == len(labelled.cls) == len(labelled.labels) == 11
    assert int(labelled.labels.min()) >= 0


def test_embed_writes_the_features_of_a_folder(model, folder: Path, tmp_path: Path):
    weights = tmp_path / "w.safetensors"
    save_backbone(model, weights)
    out = tmp_path / "f.safetensors"
    result = embed(weights, data=folder, out=out, device="cpu", num_workers=0)
    assert result["images"] == 11
    assert len(result["unreadable"]) == 1
    assert _equal(Features.load(out), extract_features(model, open_images(folder)))


def test_embed_says_a_wrong_file_name_before_any_work(folder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        embed(tmp_path / "missing.pth", data=folder, out=tmp_path / "f.npz")


def test_embed_never_replaces_the_weights_it_reads(model, folder: Path, tmp_path: Path):
    weights = tmp_path / "run" / "teacher.safetensors"
    weights.parent.mkdir()
    save_backbone(model, weights)
    before = weights.read_bytes()
    for checkpoint in (weights, weights.parent):
        with pytest.raises(ConfigError, match="choose another --out"):
            embed(checkpoint, data=folder, out=weights, device="cpu", num_workers=0)
    assert weights.read_bytes() == before


def test_an_output_folder_that_is_a_file_is_an_output_error(model, folder: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    features = extract_features(model, open_images(folder))
    with pytest.raises(OutputError, match="cannot write"):
        features.save(tmp_path / "file" / "f.safetensors")


def test_default_sizes_are_the_models_own_or_those_of_the_published_protocol():
    assert default_image_px(create_model("debug", image_px=518, device="meta")) == 224
    assert default_image_px(create_model("debug", image_px=28, device="meta")) == 28
    odd = create_model("debug", image_px=400, patch_size=25, device="meta")
    assert default_image_px(odd) == 200  # the largest multiple of 25 up to 224
    assert [default_resize_px(px) for px in (28, 224, 518)] == [28, 256, 592]


def test_a_run_directory_means_its_teacher_or_else_its_newest_checkpoint(model, tmp_path: Path):
    with pytest.raises(CheckpointError, match="does not exist"):
        find_weights(tmp_path / "run")
    run = tmp_path / "run"
    for step in (5, 10):
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"teacher\.safetensors"):
        find_weights(run)
    for step in (5, 10):
        save_backbone(model, run / "checkpoints" / f"step-{step:08d}" / "state.safetensors")
    assert find_weights(run).parent.name == "step-00000010"
    save_backbone(model, run / "teacher.safetensors")
    assert find_weights(run).name == "teacher.safetensors"
    (run / "config.yaml").write_text(to_yaml(Config()))
    loaded = load_model(run, device="cpu")
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.num_heads == model.num_heads


def test_a_folder_in_the_layout_of_transformers_is_loaded(model, tmp_path: Path):
    weights = tmp_path / "w.safetensors"
    save_backbone(model, weights)
    convert_file(weights, tmp_path / "hf", to="hf")
    loaded = load_model(tmp_path / "hf", device="cpu")
    state, other = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(state[key], other[key]) for key in state)


def test_an_unknown_device_is_a_configuration_error():
    with pytest.raises(ConfigError, match="toaster"):
        resolve_device("toaster")
    assert resolve_device("auto").type in ("cpu", "cuda")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="0 GPUs"):
            resolve_device("cuda")
