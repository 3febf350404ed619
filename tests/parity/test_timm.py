"""The same weights in timm: same tokens, same gradients."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from dinov2_fast.models.pretrained import convert_file, from_official, save_backbone, to_official
from tests.inputs import randn
from tests.models.weights import states_equal
from tests.parity.comparison import (
    MODELS,
    NATIVE_PX,
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

NAMES = {
    "vits14": "vit_small_patch14_dinov2",
    "vits14_reg4": "vit_small_patch14_reg4_dinov2",
    "vitg14": "vit_giant_patch14_dinov2",
    "vitg14_reg4": "vit_giant_patch14_reg4_dinov2",
}


@pytest.fixture
def timm(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("timm", reason="timm is not installed")


def their_model(timm, arch: str, state, **options):
    settings = {"img_size": NATIVE_PX[arch], **MODELS[arch], **options}
    model = timm.create_model(NAMES[arch], pretrained=False, **settings)
    model.load_state_dict(state, strict=True)
    return model.eval()


def translated(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our gradients under timm's names."""
    names = {"register_tokens": "reg_token"}
    out = {}
    for name, gradient in gradients.items():
        name = names.get(name, name.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2."))
        out[name] = gradient
    if "reg_token" in out:  # there CLS has no position of its own
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


@pytest.mark.parametrize("arch", sorted(MODELS))
def test_tokens_and_gradients_are_timms(timm, arch):
    ours, x = backbone(arch), images(arch)
    theirs = their_model(timm, arch, from_official(ours.state_dict(), "timm"))

    assert_same(
        translated(tokens_and_gradients(ours, our_tokens(ours), x)),
        tokens_and_gradients(theirs, theirs.forward_features, x),
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vits14", "vits14_reg4"])
def test_tokens_agree_at_the_published_size(timm, arch):
    ours, x = backbone(arch, image_px=518), randn(1, 3, 518, 518)
    theirs = their_model(timm, arch, from_official(ours.state_dict(), "timm"), img_size=518)

    with torch.no_grad():
        assert_same({"tokens": our_tokens(ours)(x)}, {"tokens": theirs.forward_features(x)})


@pytest.mark.parametrize(
    ("arch", "position_resize"), [("vits14", "antialias"), ("vits14_reg4", "preset")]
)
@pytest.mark.parametrize("size", [(56, 56), (126, 70)])
def test_other_sizes_agree_where_the_resize_is_timms(timm, arch, position_resize, size):
    ours, x = backbone(arch, position_resize=position_resize), randn(2, 3, *size)
    state = from_official(ours.state_dict(), "timm")
    theirs = their_model(timm, arch, state, dynamic_img_size=True)

    assert_same(
        translated(tokens_and_gradients(ours, our_tokens(ours), x)),
        tokens_and_gradients(theirs, theirs.forward_features, x),
    )


def test_the_official_resize_is_another_than_timms(timm):
    # Otherwise the tests above would not notice which of the two is used.
    ours, x = backbone("vits14"), randn(2, 3, 56, 56)
    theirs = their_model(
        timm, "vits14", from_official(ours.state_dict(), "timm"), dynamic_img_size=True
    )

    with torch.no_grad():
        difference = (our_tokens(ours)(x) - theirs.forward_features(x)).abs().max()

    assert difference > 1e-2


@pytest.mark.parametrize("arch", ["vits14", "vits14_reg4"])
def test_a_timm_models_own_state_becomes_official(timm, arch):
    theirs = timm.create_model(
        NAMES[arch], pretrained=False, img_size=NATIVE_PX[arch], **MODELS[arch]
    )
    theirs.eval()
    ours, x = backbone(arch), images(arch)

    ours.load_state_dict(to_official(theirs.state_dict()))

    assert states_equal(from_official(ours.state_dict(), "timm"), dict(theirs.state_dict()))
    with torch.no_grad():
        assert_same({"tokens": our_tokens(ours)(x)}, {"tokens": theirs.forward_features(x)})


def test_a_converted_file_is_one_that_timm_loads(timm, tmp_path):
    ours, x = backbone("vits14_reg4"), images("vits14_reg4")
    save_backbone(ours, tmp_path / "official.safetensors")
    convert_file(tmp_path / "official.safetensors", tmp_path / "timm.safetensors", "timm")

    theirs = their_model(timm, "vits14_reg4", load_file(tmp_path / "timm.safetensors"))

    with torch.no_grad():
        assert_same({"tokens": our_tokens(ours)(x)}, {"tokens": theirs.forward_features(x)})


def test_our_blocks_drop_into_timms_model(timm):
    ours, x = backbone("vits14_reg4"), images("vits14_reg4")
    theirs = their_model(timm, "vits14_reg4", from_official(ours.state_dict(), "timm"))
    with torch.no_grad():
        before = theirs.forward_features(x)

    theirs.blocks = torch.nn.Sequential(*ours.blocks)

    with torch.no_grad():
        assert_same({"tokens": theirs.forward_features(x)}, {"tokens": before})


def test_attention_is_timms(timm):
    ours, x = backbone("vits14_reg4"), images("vits14_reg4")
    theirs = their_model(timm, "vits14_reg4", from_official(ours.state_dict(), "timm"))
    theirs.blocks[7].attn.fused_attn = False
    seen = []
    theirs.blocks[7].attn.attn_drop.register_forward_hook(lambda _m, _i, out: seen.append(out))

    with torch.no_grad():
        theirs(x)
        attention = ours.return_attention(x, 7)

    assert_same({"attention": attention}, {"attention": seen[0]})


def test_intermediate_layers_are_timms(timm):
    ours, x = backbone("vits14_reg4"), images("vits14_reg4")
    theirs = their_model(timm, "vits14_reg4", from_official(ours.state_dict(), "timm"))
    indices = [2, 5, 8, 11]

    with torch.no_grad():
        mine = ours.get_intermediate_layers(x, indices, reshape=True, return_class_token=True)
        others = theirs.get_intermediate_layers(
            x, indices, reshape=True, return_prefix_tokens=True, norm=True
        )

    for (maps, cls_token), (their_maps, their_prefix) in zip(mine, others, strict=True):
        assert_same(
            {"maps": maps, "cls": cls_token}, {"maps": their_maps, "cls": their_prefix[:, 0]}
        )
