from __future__ import annotations

import base64
import dataclasses
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_fast.config import Config, CropConfig
from dinov2_fast.data.datasets import open_images
from dinov2_fast.data.loader import BatchBuilder
from dinov2_fast.errors import OutputError
from dinov2_fast.features import extract_features
from dinov2_fast.models.presets import create_model
from dinov2_fast.report.pictures import center_crop, shade_masked, thumbnail, to_picture
from dinov2_fast.report.report import (
    Accuracy,
    ReportContents,
    build_report,
    patch_tokens,
)
from dinov2_fast.report.run_facts import config_differences, environment_facts
from tests.inputs import randn

HOSTILE = '"><img src=http:x onerror=alert(1)>\n\x1b[31m&'
SECTIONS = ["result", "curves", "crops", "components", "neighbors", "run"]


class Reader(HTMLParser):
    """Everything a browser would act on, and whether the tags nest."""

    VOID = ("img", "meta", "br", "hr", "line", "rect", "circle", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _write_images(root: Path, names: list[str], count: int) -> Path:
    rng = np.random.default_rng(0)
    for name in names:
        os.makedirs(root / name)
        for i in range(count):
            pixels = rng.integers(0, 256, (32, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def contents(tmp_path: Path) -> ReportContents:
    crops = CropConfig(global_px=28, local_px=14, num_local=3)
    config = dataclasses.replace(Config(), crops=crops)
    train = open_images(_write_images(tmp_path / "train", [HOSTILE, "plain"], 4))
    test = open_images(_write_images(tmp_path / "test", [HOSTILE, "plain"], 2))
    model = create_model("debug", image_px=28, layer_scale=1.0)
    batch = BatchBuilder(
        train,
        crops=crops,
        masks=config.masks,
        patch_size=14,
        recipe="official",
        seed=0,
        batch_size=4,
        rank=0,
        world_size=1,
        max_pixels=10**6,
    ).build(0)
    records = [
        {"step": step, "loss": 9.0 / step, "dino": 4.0, "ibot": None, "koleo": 1.0, "lr": 1e-3}
        for step in (1, 10, 20)
    ]
    return ReportContents(
        title=f"Title {HOSTILE}",
        subtitle=f"Subtitle {HOSTILE}",
        config=config,
        model=model,
        accuracies=[Accuracy("raw pixels", 12.5), Accuracy(f"trained {HOSTILE}", 62.5, 50.0)],
        k=20,
        metrics=records,
        train_source=train,
        test_source=test,
        train=extract_features(model, train),
        test=extract_features(model, test),
        batch=batch,
        pca_images={HOSTILE: Image.new("RGB", (42, 42), "red"), "b": Image.new("RGB", (42, 42))},
        facts={f"Fact {HOSTILE}": HOSTILE},
    )


def test_the_page_loads_nothing_and_runs_nothing(contents: ReportContents, tmp_path: Path):
    text = build_report(tmp_path / "out", contents).read_text(encoding="utf-8")
    reader = Reader(text)
    assert not reader.of("script")
    assert not reader.of("link")
    assert not reader.of("iframe")
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#"))
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    (policy,) = [m["content"] for m in reader.of("meta") if m.get("http-equiv")]
    assert "default-src 'none'" in policy


def test_hostile_names_are_shown_as_text(contents: ReportContents, tmp_path: Path):
    text = build_report(tmp_path, contents).read_text(encoding="utf-8")
    reader = Reader(text)
    assert not reader.open  # all elements are closed in order
    assert "<img src=http:x" not in text
    assert "\x1b" not in text
    shown = '"><img src=http:x onerror=alert(1)>\\n\\x1b[31m&'
    assert reader.words.count(shown) > 10  # title, captions, tables
    assert any(shown in image["alt"] for image in reader.of("img"))


def test_all_sections_are_there_and_linked(contents: ReportContents, tmp_path: Path):
    reader = Reader(build_report(tmp_path, contents).read_text(encoding="utf-8"))
    assert [section["id"] for section in reader.of("section")] == SECTIONS
    assert [link["href"] for link in reader.of("a")] == [f"#{key}" for key in SECTIONS]
    assert "62.5 %" in reader.words
    assert "50.0 %" in reader.words
    assert "crops.global_px" in reader.words
    assert len(reader.of("svg")) == 6  # bars and five curves


def test_every_picture_is_a_whole_png(contents: ReportContents, tmp_path: Path):
    reader = Reader(build_report(tmp_path, contents).read_text(encoding="utf-8"))
    pictures = reader.of("img")
    # Two images of the batch (one a class) with 1 + 2 + 3 pictures, 2 x 3 components, and four
    # test images with five neighbours each.
    assert len(pictures) == 2 * 6 + 2 * 3 + 4 * 6
    for picture in pictures:
        data = base64.b64decode(picture["src"].partition(",")[2])
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert image.format == "PNG"
            ratio = int(picture["width"]) / int(picture["height"])
            assert ratio == pytest.approx(image.width / image.height, rel=0.05)


def test_frames_tell_right_neighbours_from_wrong_ones(contents: ReportContents, tmp_path: Path):
    text = build_report(tmp_path, contents).read_text(encoding="utf-8")
    reader = Reader(text)
    right = [f for f in reader.of("figure") if f.get("class") == "right"]
    wrong = [f for f in reader.of("figure") if f.get("class") == "wrong"]
    assert len(right) + len(wrong) == 4 * 5
    assert f"{len(right)} of 20 are right" in reader.words
    alternatives = [image["alt"] for image in reader.of("img")]
    assert sum(alt.startswith("right neighbour") for alt in alternatives) == len(right)


def test_the_same_contents_give_the_same_page(contents: ReportContents, tmp_path: Path):
    first = build_report(tmp_path / "a", contents).read_bytes()
    assert build_report(tmp_path / "b", contents).read_bytes() == first
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["report.html"]


def test_unlabelled_images_and_missing_curves_still_give_a_page(
    contents: ReportContents, tmp_path: Path
):
    unlabelled = dataclasses.replace(
        contents.train, labels=torch.full_like(contents.train.labels, -1), class_names=[]
    )
    changed = dataclasses.replace(contents, train=unlabelled, metrics=[], pca_images={})
    words = Reader(build_report(tmp_path, changed).read_text(encoding="utf-8")).words
    assert words.count("nothing was recorded") == 5
    assert "No pictures were given" in words


def test_a_folder_that_cannot_be_written_is_an_output_error(
    contents: ReportContents, tmp_path: Path
):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"report\.html"):
        build_report(tmp_path / "file", contents)


def test_a_crop_is_shown_as_it_was_before_normalisation():
    from dinov2_fast.data.augmentation import evaluation_transform

    pixels = np.random.default_rng(0).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    crop = evaluation_transform(14, 14)(Image.fromarray(pixels))
    assert np.array_equal(np.asarray(to_picture(crop)), pixels)


def test_masked_patches_are_shaded_and_the_others_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    mask = torch.tensor([False, True, False, False, False, True])  # grid of 2 x 3, patches of 2 px
    shaded = np.asarray(shade_masked(Image.fromarray(pixels), mask, (2, 3)))
    changed = (shaded != pixels).any(axis=2)
    hidden = np.zeros((4, 6), dtype=bool)
    hidden[0:2, 2:4] = hidden[2:4, 4:6] = True
    assert not changed[~hidden].any()
    assert changed[hidden].all()


def test_pictures_are_cut_to_a_size_and_never_enlarged_as_thumbnails():
    picture = Image.new("RGB", (90, 40))
    assert center_crop(picture, 30, 30).size == (30, 30)
    assert thumbnail(picture, 45).size == (45, 20)
    assert thumbnail(picture, 500).size == (90, 40)


def test_patch_tokens_of_pictures_are_those_of_the_model():
    model = create_model("debug", image_px=28).train()
    picture = to_picture(randn(3, 42, 42))
    from dinov2_fast.data.augmentation import evaluation_transform

    tokens = patch_tokens(model, [picture])
    with torch.no_grad():
        expected = model.forward_features(evaluation_transform(42, 42)(picture)[None])
    assert torch.equal(tokens, expected["x_norm_patchtokens"])
    assert model.training


def test_only_settings_that_differ_are_listed_and_never_where_the_images_lie():
    assert config_differences(Config()) == []
    config = Config().updated({"optimizer.base_lr": 1e-3, "data.path": "/home/someone/images"})
    assert config_differences(config) == [("optimizer.base_lr", "0.001", "0.004")]


def test_facts_about_the_machine_hold_no_names_of_hosts_or_people(
    monkeypatch: pytest.MonkeyPatch,
):
    import platform

    monkeypatch.setattr(platform, "node", lambda: "the-host")
    monkeypatch.setenv("USER", "the-user")
    monkeypatch.setenv("HOME", "/home/the-user")
    text = " ".join(environment_facts().values())
    assert "the-host" not in text
    assert "the-user" not in text
    assert torch.__version__.split("+")[0] in text
