"""The same weights in transformers: same tokens, same gradients, files both libraries read."""

from __future__ import annotations

import logging

import pytest
import torch

from dinov2_fast.models.pretrained import (
    convert_file,
    detect_format,
    load_backbone,
    save_backbone,
    to_official,
)
from tests.inputs import randn
from tests.models.weights import VARIANTS, states_equal, tiny_backbone
from tests.parity.comparison import (
    MODELS,
    assert_same,
    backbone,
    images,
    our_tokens,
    tokens_and_gradients,
)

pytestmark = [
    pytest.mark.parity,
    # Third-party imports warn about their own futures.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    module = pytest.importorskip("transformers", reason="transformers is not installed")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return module


def their_model(transformers, ours, folder):
    """The model that transformers makes of our folder; not one key may be left over."""
    save_backbone(ours, folder / "official.safetensors")
    convert_file(folder / "official.safetensors", folder / "hf", "hf")
    model, report = transformers.AutoModel.from_pretrained(folder / "hf", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def in_official_names(ours, theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their gradients under our names.

    Not ours under theirs: keys have a bias whose exact gradient is zero, softmax does not see it,
    so that alone it would be rounding against rounding.
    """
    gradients = {k: v for k, v in theirs.items() if k not in ("tokens", "input")}
    gradients["embeddings.mask_token"] = torch.zeros_like(ours.mask_token)  # takes no part
    named = to_official(gradients)
    del named["mask_token"]
    return named | {key: theirs[key] for key in ("tokens", "input")}


def compare(transformers, ours, folder, x) -> None:
    theirs = their_model(transformers, ours, folder)
    outputs = tokens_and_gradients(theirs, lambda images: theirs(images).last_hidden_state, x)

    assert_same(tokens_and_gradients(ours, our_tokens(ours), x), in_official_names(ours, outputs))


@pytest.mark.parametrize("arch", sorted(MODELS))
def test_tokens_and_gradients_are_those_of_transformers(transformers, tmp_path, arch):
    compare(transformers, backbone(arch), tmp_path, images(arch))


@pytest.mark.parametrize("size", [(56, 56), (126, 70)])
def test_other_sizes_agree_with_registers(transformers, tmp_path, size):
    compare(transformers, backbone("vits14_reg4"), tmp_path, randn(2, 3, *size))


def test_masked_tokens_agree(transformers, tmp_path):
    ours, x = backbone("vits14"), images("vits14")
    theirs = their_model(transformers, ours, tmp_path)
    masks = torch.arange(2 * 49).view(2, 49) % 3 == 0

    with torch.no_grad():
        mine = ours.norm(ours.forward_features(x, masks)["x_prenorm"])
        others = theirs(x, bool_masked_pos=masks).last_hidden_state

    assert_same({"tokens": mine}, {"tokens": others})


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_holds_and_saves_is_read_back_bit_exactly(
    transformers, tmp_path, variant
):
    ours = tiny_backbone(variant)
    theirs = their_model(transformers, ours, tmp_path)

    major_version = int(transformers.__version__.split(".")[0])
    assert detect_format(theirs.state_dict()) == ("hf" if major_version < 5 else "hf5")
    assert states_equal(to_official(theirs.state_dict()), dict(ours.state_dict()))

    theirs.save_pretrained(tmp_path / "saved")
    loaded = load_backbone(tmp_path / "saved")
    assert states_equal(dict(loaded.state_dict()), dict(ours.state_dict()))
    assert loaded.num_heads == ours.num_heads


def test_the_folder_brings_the_preprocessing_of_dinov2(transformers, tmp_path):
    their_model(transformers, tiny_backbone(), tmp_path)

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    pixels = processor(torch.zeros(3, 300, 400, dtype=torch.uint8), return_tensors="pt")

    assert pixels["pixel_values"].shape == (1, 3, 224, 224)
    expected = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels["pixel_values"][0, :, 0, 0], expected)
