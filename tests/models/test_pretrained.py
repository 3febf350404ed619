"""Strict loading, models from files, conversion of files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dinov2_fast.errors import CheckpointError, ConfigError, OutputError
from dinov2_fast.models import create_model
from dinov2_fast.models.pretrained import (
    backbone_metadata,
    convert_file,
    from_official,
    infer_shape,
    load_backbone,
    load_into,
    load_weights,
    save_backbone,
    to_official,
)
from dinov2_fast.nn import DINOHead
from tests.models.weights import VARIANTS, states_equal, tiny_backbone

IMAGES = (2, 3, 28, 42)


# Loading into a model


def test_loads_every_tensor():
    source, target = (
        tiny_backbone("swiglu_reg"),
        create_model("debug", image_px=56, ffn="swiglu", num_registers=4),
    )

    load_into(target, source.state_dict())

    assert states_equal(target.state_dict(), source.state_dict())


def test_a_meta_model_comes_to_life():
    source = tiny_backbone()
    target = create_model("debug", image_px=56, device="meta")

    load_into(target, {key: tensor.double() for key, tensor in source.state_dict().items()})

    assert states_equal(target.state_dict(), source.state_dict())  # in the dtype of the model
    assert all(parameter.requires_grad for parameter in target.parameters())


def message_of(model, state) -> str:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_into(model, state)
    assert states_equal(model.state_dict(), before)  # nothing was loaded
    return str(caught.value)


def test_another_image_size_names_the_one_to_use():
    state = tiny_backbone(image_px=98).state_dict()

    message = message_of(tiny_backbone(image_px=56), state)

    assert "mis-shaped (1): pos_embed expected (1, 17, 64), got (1, 50, 64)" in message
    assert "create the model with image_px=98" in message
    assert "the weights fit create_model('debug', image_px=98)" in message


def test_registers_name_the_architecture():
    plain, registers = tiny_backbone("mlp"), tiny_backbone("mlp_reg")

    message = message_of(plain, registers.state_dict())
    assert "unexpected (1): register_tokens" in message
    assert "have 4 register tokens, the model 0: use the architecture with _reg4" in message

    message = message_of(registers, plain.state_dict())
    assert "missing (1): register_tokens" in message
    assert "have 0 register tokens, the model 4: use the architecture without _reg4" in message


def test_a_published_architecture_is_named():
    state = create_model("vitl14_reg4", device="meta").state_dict()
    model = create_model("vits14", device="meta")

    with pytest.raises(CheckpointError) as caught:
        load_into(model, state)

    message = str(caught.value)
    assert "unexpected (169): " in message  # 12 more blocks of 14 and the registers
    assert "mis-shaped (175): " in message  # all that the model has
    assert "the weights fit create_model('vitl14_reg4', image_px=518)" in message


def test_another_feed_forward_layer_is_named():
    message = message_of(tiny_backbone("mlp"), tiny_backbone("swiglu").state_dict())

    assert "missing (8): blocks.0.mlp.fc1.weight" in message
    assert "unexpected (8): blocks.0.mlp.w12.weight" in message
    assert "create_model('debug', image_px=56, ffn='swiglu')" in message


def test_another_patch_size_is_named():
    state = tiny_backbone(patch_size=7, image_px=28).state_dict()

    message = message_of(tiny_backbone(), state)

    assert "patch_embed.proj.weight expected (64, 3, 14, 14), got (64, 3, 7, 7)" in message
    assert "create_model('debug', image_px=28, patch_size=7)" in message


@pytest.mark.parametrize("layout", ["timm", "hf", "hf5", "dump"])
def test_another_layout_is_named(layout):
    model = tiny_backbone("mlp_reg")

    message = message_of(model, from_official(model.state_dict(), layout))

    assert f"the keys are in the {layout} layout: load to_official(state)" in message


def test_foreign_weights_and_integers_are_refused():
    model = tiny_backbone()

    assert "unexpected (1): conv.weight" in message_of(model, {"conv.weight": torch.zeros(1)})
    state = model.state_dict() | {"norm.bias": torch.zeros(64, dtype=torch.int64)}
    assert "norm.bias expected a floating-point type, got torch.int64" in message_of(model, state)


def test_heads_are_loaded_as_strictly():
    head = DINOHead(64, 10, hidden_dim=12, bottleneck_dim=6)
    state = head.state_dict()
    state["last_layer.weight"] = state.pop("last_layer.weight_v")

    message = message_of(head, state)

    assert "missing (1): last_layer.weight_v" in message
    assert "unexpected (1): last_layer.weight" in message


# Models from files


@pytest.mark.parametrize("layout", ["official", "timm", "hf", "hf5", "dump"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_of_any_layout_becomes_the_same_model(tmp_path, variant, layout):
    model, x = tiny_backbone(variant), torch.randn(IMAGES)
    save_file(from_official(model.state_dict(), layout, block_chunks=2), tmp_path / "w.safetensors")

    loaded = load_backbone(tmp_path / "w.safetensors")

    assert torch.equal(loaded.eval()(x), model(x))
    assert loaded.position_resize == model.position_resize
    assert (loaded.num_heads, loaded.ffn, loaded.depth) == (1, model.ffn, 2)


def test_half_precision_files_become_float32_models(tmp_path):
    torch.save(tiny_backbone().bfloat16().state_dict(), tmp_path / "w.pth")

    loaded = load_backbone(tmp_path / "w.pth")

    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())
    assert loaded(torch.randn(IMAGES)).isfinite().all()


def test_a_training_dump_with_heads_becomes_a_backbone(tmp_path):
    model, head = tiny_backbone(depth=2), DINOHead(64, 10, hidden_dim=12, bottleneck_dim=6)
    dump = {f"backbone.blocks.{key[7]}.{key[7:]}" if "blocks" in key else f"backbone.{key}": tensor
            for key, tensor in model.state_dict().items()}  # fmt: skip
    dump |= {f"dino_head.{key}": tensor for key, tensor in head.state_dict().items()}
    torch.save({"teacher": dump}, tmp_path / "teacher_checkpoint.pth")

    assert states_equal(
        load_backbone(tmp_path / "teacher_checkpoint.pth").state_dict(), model.state_dict()
    )


def test_saved_models_know_what_shapes_do_not_tell(tmp_path):
    model = tiny_backbone(embed_dim=48, num_heads=3, depth=1, position_resize="antialias")
    x = torch.randn(IMAGES)

    save_backbone(model, tmp_path / "w.safetensors")
    loaded = load_backbone(tmp_path / "w.safetensors").eval()

    assert (loaded.num_heads, loaded.position_resize) == (3, "antialias")
    assert torch.equal(loaded(x), model(x))
    assert load_backbone(
        tmp_path / "w.safetensors", position_resize="official"
    ).position_resize == ("official")


def test_the_number_of_heads_is_never_guessed(tmp_path):
    model = tiny_backbone(embed_dim=48, num_heads=3, depth=1)
    torch.save(model.state_dict(), tmp_path / "w.pth")

    with pytest.raises(CheckpointError, match="number of heads no shape tells; pass num_heads"):
        load_backbone(tmp_path / "w.pth")
    assert torch.equal(
        load_backbone(tmp_path / "w.pth", num_heads=3).eval()(torch.ones(IMAGES)),
        model(torch.ones(IMAGES)),
    )
    with pytest.raises(
        CheckpointError, match=r"no model has these shapes.* dim 48 and num_heads 5"
    ):
        load_backbone(tmp_path / "w.pth", num_heads=5)


def test_wrong_statements_in_a_file_are_refused(tmp_path):
    model = tiny_backbone()
    (key,) = backbone_metadata(model)
    save_file(model.state_dict(), tmp_path / "w.safetensors", {key: '{"position_resize": "warp"}'})

    with pytest.raises(CheckpointError, match="position_resize to be one of official, antialias"):
        load_backbone(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("pos_embed", (1, 18, 64), r"square grid of patches\n.*pos_embed got \(1, 18, 64\)"),
        ("pos_embed", (1, 1, 64), "square grid"),
        ("pos_embed", (17, 64), r"pos_embed expected 3 dimensions, got \(17, 64\)"),
        ("patch_embed.proj.weight", (64, 588), "patch_embed.proj.weight expected 4 dimensions"),
        ("patch_embed.proj.weight", (64, 3, 14, 13), r"3, 14, 14\), got \(64, 3, 14, 13\)"),
        ("blocks.1.attn.qkv.weight", (192, 63), r"expected \(192, 64\), got \(192, 63\)"),
        ("cls_token", (1, 2, 64), r"cls_token expected \(1, 1, 64\), got \(1, 2, 64\)"),
        ("blocks.0.mlp.fc1.weight", (256,), "expected 2 dimensions"),
    ],
)
def test_shapes_that_no_model_has_are_refused(tmp_path, key, shape, message):
    state = tiny_backbone().state_dict()
    save_file({**state, key: torch.zeros(shape)}, tmp_path / "w.safetensors")

    with pytest.raises(CheckpointError, match=message):
        load_backbone(tmp_path / "w.safetensors", num_heads=1)
    with pytest.raises(CheckpointError, match=message):
        convert_file(tmp_path / "w.safetensors", tmp_path / "out.safetensors", "official")
    assert not (tmp_path / "out.safetensors").exists()


def test_shapes_tell_the_architecture():
    model = create_model("vitg14_reg4", image_px=224, device="meta")

    assert infer_shape(model.state_dict()) == {
        "image_px": 224,
        "patch_size": 14,
        "in_channels": 3,
        "embed_dim": 1536,
        "depth": 40,
        "mlp_ratio": 4.0,
        "ffn": "swiglu",
        "num_registers": 4,
    }


@pytest.mark.parametrize("hidden", [100, 147, 49, 145])  # widths whose ratio to 49 rounds down
def test_any_hidden_width_is_recovered(hidden):
    state = create_model("debug", image_px=28, embed_dim=49, device="meta").state_dict()
    for i in range(2):
        state[f"blocks.{i}.mlp.fc1.weight"] = torch.empty(hidden, 49, device="meta")

    assert int(49 * infer_shape(state)["mlp_ratio"]) == hidden


# Conversion of files


@pytest.mark.parametrize("source", ["official", "timm", "hf", "hf5", "dump"])
@pytest.mark.parametrize(
    ("to", "target"),
    [
        ("official", "w.pth"),
        ("official", "w.safetensors"),
        ("timm", "w.safetensors"),
        ("hf", "w.safetensors"),
        ("hf", "folder"),
    ],
)
def test_converts_every_layout_into_every_other(tmp_path, source, to, target):
    for variant in VARIANTS:
        state = tiny_backbone(variant).state_dict()
        given = from_official(state, source, block_chunks=2)
        save_file(given, tmp_path / "in.safetensors")

        done = convert_file(tmp_path / "in.safetensors", tmp_path / target, to)

        expected = from_official(to_official(given), to)
        assert states_equal(load_weights(tmp_path / target), expected)
        assert (done.source_layout, done.target_layout) == (source, to)
        assert done.num_parameters == sum(tensor.numel() for tensor in state.values())


def test_the_report_is_readable(tmp_path):
    save_backbone(tiny_backbone("mlp_reg"), tmp_path / "in.safetensors")

    text = str(convert_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "timm"))

    assert "in.safetensors: official DINOv2\n" in text
    assert "out.safetensors: timm\n" in text
    # By hand: tokens, patch embedding, two blocks, norm.
    count = (1 + 17 + 4 + 1) * 64 + (588 + 1) * 64 + 2 * 50_112 + 128
    assert f"debug: {count:,} parameters in the official layout, width 64, 2 blocks, mlp," in text
    assert "note: timm has no mask token; it is left out" in text


def test_dtypes_stay(tmp_path):
    state = {key: t.bfloat16() for key, t in tiny_backbone("swiglu").state_dict().items()}
    torch.save(state, tmp_path / "in.pth")

    convert_file(tmp_path / "in.pth", tmp_path / "folder", "hf")

    assert {t.dtype for t in load_weights(tmp_path / "folder").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_what_shapes_do_not_tell_survives_a_conversion(tmp_path):
    model = tiny_backbone(embed_dim=48, num_heads=3, depth=1, position_resize="antialias")
    save_backbone(model, tmp_path / "a.safetensors")

    convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "timm")
    convert_file(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "official")
    convert_file(tmp_path / "c.safetensors", tmp_path / "folder", "hf")

    loaded = load_backbone(tmp_path / "c.safetensors")
    assert (loaded.num_heads, loaded.position_resize) == (3, "antialias")
    assert load_backbone(tmp_path / "folder").num_heads == 3


def test_a_hugging_face_file_says_that_it_is_of_torch(tmp_path):
    save_backbone(tiny_backbone(), tmp_path / "in.safetensors")

    convert_file(tmp_path / "in.safetensors", tmp_path / "hf.safetensors", "hf")

    with safe_open(tmp_path / "hf.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without


def test_a_folder_needs_the_number_of_heads(tmp_path):
    torch.save(tiny_backbone(embed_dim=48, num_heads=3).state_dict(), tmp_path / "in.pth")

    with pytest.raises(CheckpointError, match="number of heads no shape tells"):
        convert_file(tmp_path / "in.pth", tmp_path / "folder", "hf")
    assert not (tmp_path / "folder").exists()
    convert_file(tmp_path / "in.pth", tmp_path / "hf.safetensors", "hf")  # names need no heads


@pytest.mark.parametrize(
    ("to", "target", "message"),
    [
        ("timm", "w.pth", r"expected OUT with \.safetensors for --to timm, got w\.pth"),
        ("hf", "w.pth", r"\.safetensors or no suffix \(a folder\) for --to hf"),
        ("official", "w", r"\.safetensors or \.pth for --to official, got w"),
        ("onnx", "w.onnx", "official, timm or hf, got 'onnx'"),
    ],
)
def test_targets_that_a_layout_does_not_know_are_refused(tmp_path, to, target, message):
    save_backbone(tiny_backbone(), tmp_path / "in.safetensors")

    with pytest.raises(ConfigError, match=message):
        convert_file(tmp_path / "in.safetensors", tmp_path / target, to)


def test_a_target_that_cannot_be_written_is_an_output_error(tmp_path):
    save_backbone(tiny_backbone(), tmp_path / "in.safetensors")
    (tmp_path / "file").write_text("")

    for to, target in (("official", "file/w.safetensors"), ("hf", "file/folder"), ("hf", "file")):
        with pytest.raises(OutputError):
            convert_file(tmp_path / "in.safetensors", tmp_path / target, to)


def test_a_file_is_never_converted_onto_itself(tmp_path):
    # The copy holds less: official files no heads, timm's no mask token.
    state = tiny_backbone("mlp_reg").state_dict()
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}}, tmp_path / "w.pth")
    before = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "link.pth").symlink_to("w.pth")

    for target in ("w.pth", "link.pth"):
        with pytest.raises(ConfigError, match="choose another OUT"):
            convert_file(tmp_path / "w.pth", tmp_path / target, "official")

    assert (tmp_path / "w.pth").read_bytes() == before


def test_saved_backbones_are_safetensors(tmp_path):
    with pytest.raises(ConfigError, match=r"ending in \.safetensors, got w\.pth"):
        save_backbone(tiny_backbone(), tmp_path / "w.pth")
