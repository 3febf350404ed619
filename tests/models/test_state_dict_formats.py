"""Names in other projects, spelled out; round trips; what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from dinov2_fast.errors import CheckpointError
from dinov2_fast.models import create_model
from dinov2_fast.models.pretrained import detect_format, from_official, to_official
from dinov2_fast.models.state_dict_formats import LAYOUTS, Skeleton, conversion_notes, official_keys
from tests.models.weights import VARIANTS, states_equal, tiny_backbone

TIMM_BLOCK = [
    "norm1.weight",
    "norm1.bias",
    "attn.qkv.weight",
    "attn.qkv.bias",
    "attn.proj.weight",
    "attn.proj.bias",
    "ls1.gamma",
    "norm2.weight",
    "norm2.bias",
    "mlp.fc1.weight",
    "mlp.fc1.bias",
    "mlp.fc2.weight",
    "mlp.fc2.bias",
    "ls2.gamma",
]
HF_EMBEDDINGS = [
    "embeddings.cls_token",
    "embeddings.mask_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.projection.bias",
]
HF_BLOCK = {
    "hf": [
        "norm1.weight",
        "norm1.bias",
        "attention.attention.query.weight",
        "attention.attention.query.bias",
        "attention.attention.key.weight",
        "attention.attention.key.bias",
        "attention.attention.value.weight",
        "attention.attention.value.bias",
        "attention.output.dense.weight",
        "attention.output.dense.bias",
        "layer_scale1.lambda1",
        "norm2.weight",
        "norm2.bias",
        "layer_scale2.lambda1",
    ],
    "hf5": [
        "norm1.weight",
        "norm1.bias",
        "attention.q_proj.weight",
        "attention.q_proj.bias",
        "attention.k_proj.weight",
        "attention.k_proj.bias",
        "attention.v_proj.weight",
        "attention.v_proj.bias",
        "attention.o_proj.weight",
        "attention.o_proj.bias",
        "layer_scale1.lambda1",
        "norm2.weight",
        "norm2.bias",
        "layer_scale2.lambda1",
    ],
}
HF_FFN = {
    ("hf", "mlp"): ["mlp.fc1", "mlp.fc2"],
    ("hf5", "mlp"): ["mlp.fc1", "mlp.fc2"],
    ("hf", "swiglu"): ["mlp.weights_in", "mlp.weights_out"],
    ("hf5", "swiglu"): ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
}
CLS_PARTS = {
    "official": ("cls_token", "pos_embed"),
    "dump": ("teacher.backbone.cls_token", "teacher.backbone.pos_embed"),
    "hf": ("embeddings.cls_token", "embeddings.position_embeddings"),
    "hf5": ("embeddings.cls_token", "embeddings.position_embeddings"),
}


def official(variant: str) -> dict[str, torch.Tensor]:
    """Official weights; those of a mask token that was never trained fit every layout."""
    state = tiny_backbone(variant).state_dict()
    state["mask_token"] = torch.zeros_like(state["mask_token"])
    return state


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_keys_are_those_of_the_model(variant):
    model = tiny_backbone(variant)

    keys = official_keys(Skeleton(2, model.ffn, model.num_registers > 0))

    assert len(keys) == len(set(keys))
    assert set(keys) == set(model.state_dict())


@pytest.mark.parametrize("variant", ["mlp", "swiglu_reg"])
def test_timm_keys(variant):
    keys = ["cls_token", "pos_embed", *(["reg_token"] if "reg" in variant else [])]
    keys += ["patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"]
    keys += [f"blocks.{i}.{leaf}" for i in range(2) for leaf in TIMM_BLOCK]

    assert sorted(from_official(official(variant), "timm")) == sorted(keys)


@pytest.mark.parametrize("layout", ["hf", "hf5"])
@pytest.mark.parametrize("variant", ["mlp", "swiglu_reg"])
def test_hugging_face_keys(layout, variant):
    ffn = HF_FFN[layout, variant.partition("_")[0]]
    leaves = HF_BLOCK[layout] + [f"{name}.{kind}" for name in ffn for kind in ("weight", "bias")]
    keys = [*HF_EMBEDDINGS, *(["embeddings.register_tokens"] if "reg" in variant else [])]
    keys += ["layernorm.weight", "layernorm.bias"]
    keys += [f"encoder.layer.{i}.{leaf}" for i in range(2) for leaf in leaves]

    assert sorted(from_official(official(variant), layout)) == sorted(keys)


def test_tensors_land_where_they_belong():
    state = official("swiglu_reg")
    qkv, w12 = state["blocks.1.attn.qkv.weight"], state["blocks.1.mlp.w12.bias"]

    hf, hf5 = from_official(state, "hf"), from_official(state, "hf5")
    layer = "encoder.layer.1"

    assert torch.equal(hf[f"{layer}.attention.attention.key.weight"], qkv[64:128])
    assert torch.equal(hf5[f"{layer}.attention.q_proj.weight"], qkv[:64])
    assert torch.equal(hf5[f"{layer}.attention.v_proj.weight"], qkv[128:])
    assert torch.equal(hf[f"{layer}.mlp.weights_in.bias"], w12)
    assert torch.equal(hf5[f"{layer}.mlp.gate_proj.bias"], w12[:176])
    assert torch.equal(hf5[f"{layer}.mlp.up_proj.bias"], w12[176:])
    assert torch.equal(hf[f"{layer}.layer_scale2.lambda1"], state["blocks.1.ls2.gamma"])


def test_timm_registers_move_the_cls_position_into_the_token():
    state = official("mlp_reg")

    timm = from_official(state, "timm")

    assert torch.equal(timm["cls_token"], state["cls_token"] + state["pos_embed"][:, :1])
    assert torch.equal(timm["pos_embed"], state["pos_embed"][:, 1:])
    assert torch.equal(timm["reg_token"], state["register_tokens"])


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("variant", VARIANTS)
def test_layouts_are_recognised(layout, variant):
    assert detect_format(from_official(official(variant), layout)) == layout


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(sorted(LAYOUTS), 2)))
def test_every_pair_of_layouts_round_trips_bit_exactly(source, target):
    for variant, dtype in itertools.product(VARIANTS, (torch.float32, torch.bfloat16)):
        state = {key: tensor.to(dtype) for key, tensor in official(variant).items()}
        first = from_official(state, source)

        there = from_official(to_official(first), target)
        back = from_official(to_official(there), source)

        if target == "timm" and "reg" in variant:
            # timm keeps the sum of CLS and its position: the parts are lost, nothing else is.
            token, position = CLS_PARTS[source]
            sums = [s[token] + s[position][:, :1] for s in (back, first)]
            assert torch.equal(*sums)
            assert torch.equal(back.pop(position)[:, 1:], first.pop(position)[:, 1:])
            assert back.pop(token).shape == first.pop(token).shape
        assert states_equal(back, first), (variant, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_gives_the_same_bits_after_a_trip_through_timm(variant):
    model = tiny_backbone(variant)
    x = torch.randn(2, 3, 28, 42)
    before = model.forward_features(x)["x_prenorm"]

    model.load_state_dict(to_official(from_official(model.state_dict(), "timm")))

    assert torch.equal(model.forward_features(x)["x_prenorm"], before)
    assert not model.mask_token.any()


@pytest.mark.parametrize("root", ["dinov2", "dinov2_with_registers"])
def test_hugging_face_models_with_a_head_on_top_keep_their_prefix_off(root):
    state = official("mlp_reg")
    prefixed = {f"{root}.{key}": tensor for key, tensor in from_official(state, "hf").items()}

    assert states_equal(to_official(prefixed), state)
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): classifier.weight"):
        to_official(prefixed | {"classifier.weight": torch.zeros(3, 128)})


def test_hugging_face_weights_may_go_without_a_mask_token():
    state = official("mlp")
    hf = from_official(state, "hf")
    del hf["embeddings.mask_token"]

    assert states_equal(to_official(hf), state)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("variant", ["mlp_reg", "swiglu"])
def test_every_missing_key_is_named(layout, variant):
    whole = from_official(official(variant), layout)

    optional = {"register_tokens", "reg_token"}  # without them it is a plain model
    optional |= {"mask_token"} if layout in ("hf", "hf5") else set()

    for key in whole:
        if key.split(".")[-1] in optional:
            continue
        cut = {name: tensor for name, tensor in whole.items() if name != key}
        with pytest.raises(CheckpointError):
            to_official(cut)


@pytest.mark.parametrize("layout", ["official", "timm", "hf", "hf5"])
def test_missing_and_unexpected_keys_are_listed_in_the_names_of_the_file(layout):
    state = from_official(official("mlp_reg"), layout)
    key = sorted(key for key in state if key.endswith("norm1.bias"))[1]
    state["extra.weight"] = state.pop(key)

    with pytest.raises(CheckpointError) as caught:
        to_official(state)

    assert f"missing (1): {key}" in str(caught.value)
    assert "unexpected (1): extra.weight" in str(caught.value)
    assert f"in the {layout} layout" in str(caught.value)
    assert "way out" in str(caught.value)


def test_a_gap_in_the_blocks_is_named():
    state = official("mlp")
    moved = {key.replace("blocks.1.", "blocks.7."): tensor for key, tensor in state.items()}

    with pytest.raises(
        CheckpointError, match=r"missing \(14\): blocks.1.norm1.weight.* and 2 more"
    ):
        to_official(moved)


def test_a_huge_block_number_costs_nothing():
    state = official("mlp")
    state["blocks.999999999999.norm1.weight"] = torch.zeros(64)

    with pytest.raises(CheckpointError, match=r"unexpected \(1\): blocks.999999999999"):
        to_official(state)


@pytest.mark.parametrize("state", [{}, {"conv1.weight": torch.zeros(1)}])
def test_unknown_layouts_are_refused_with_their_keys(state):
    with pytest.raises(CheckpointError, match=r"known layout .* got the keys (none|conv1.weight)"):
        to_official(state)


def test_a_backbone_without_blocks_is_refused():
    state = {key: t for key, t in official("mlp").items() if not key.startswith("blocks.")}

    with pytest.raises(CheckpointError, match="expected blocks of a transformer"):
        to_official(state)


def test_parts_that_do_not_fit_together_are_refused():
    hf = from_official(official("swiglu"), "hf5")
    name = "encoder.layer.0.attention.k_proj.weight"

    for wrong in (torch.zeros(63, 64), torch.zeros(64, 64, dtype=torch.float16)):
        with pytest.raises(CheckpointError, match=r"mis-shaped \(3\): .*k_proj.weight"):
            to_official({**hf, name: wrong})
    state = official("mlp")
    state["blocks.0.attn.qkv.bias"] = torch.zeros(191)
    with pytest.raises(
        CheckpointError, match=r"qkv.bias expected a multiple of 3 rows, got \(191,\)"
    ):
        from_official(state, "hf")


def test_from_official_takes_only_official_keys():
    timm = from_official(official("mlp"), "timm")

    with pytest.raises(CheckpointError, match=r"missing \(1\): mask_token"):
        from_official(timm, "hf")
    with pytest.raises(ValueError, match="expected one of official, timm"):
        from_official(official("mlp"), "jax")


def test_translated_parts_own_their_memory():
    hf = from_official(official("swiglu"), "hf5")

    assert all(t.untyped_storage().nbytes() == t.nbytes for key, t in hf.items() if "_proj" in key)


def test_notes_say_what_a_layout_cannot_hold():
    plain, registers = official("mlp"), official("mlp_reg")

    assert conversion_notes("official", "official", plain) == []
    assert conversion_notes("dump", "hf", registers) == []
    (resize,) = conversion_notes("official", "hf", plain)
    assert "transformers resizes position embeddings by another method" in resize
    left_out, position = conversion_notes("official", "timm", registers)
    assert "no mask token" in left_out
    assert "added to its token" in position
    zero, summed = conversion_notes("timm", "official", registers)
    assert "it is zero now" in zero
    assert "holds the sum" in summed


def test_converts_the_giant_on_meta():
    state = create_model("vitg14_reg4", device="meta").state_dict()

    hf = from_official(state, "hf5")

    assert hf["encoder.layer.39.mlp.up_proj.weight"].shape == (4096, 1536)
    assert {k: v.shape for k, v in to_official(hf).items()} == {
        k: v.shape for k, v in state.items()
    }
