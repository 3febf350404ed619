"""The vision transformer: keys, start values, tokens, packs of several sizes, layers, attention."""

from __future__ import annotations

import pytest
import torch

from dinov2_fast.models import VisionTransformer
from tests.inputs import randn
from tests.models.weights import VARIANTS, tiny_backbone
from tests.tolerance import assert_within_error_budget

# Two square crop sizes, a rectangle, and one patch alone.
SIZES = [(2, 56, 56), (3, 28, 28), (1, 42, 70), (2, 14, 14)]


def images(batch: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return randn(batch, 3, height, width, dtype=dtype, seed=height)


def test_keys_are_those_of_published_files():
    model = VisionTransformer(
        image_px=28, embed_dim=64, depth=1, num_heads=1, ffn="swiglu", num_registers=4
    )

    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == {
        "cls_token": (1, 1, 64),
        "pos_embed": (1, 5, 64),
        "register_tokens": (1, 4, 64),
        "mask_token": (1, 64),
        "patch_embed.proj.weight": (64, 3, 14, 14),
        "patch_embed.proj.bias": (64,),
        "blocks.0.norm1.weight": (64,),
        "blocks.0.norm1.bias": (64,),
        "blocks.0.attn.qkv.weight": (192, 64),
        "blocks.0.attn.qkv.bias": (192,),
        "blocks.0.attn.proj.weight": (64, 64),
        "blocks.0.attn.proj.bias": (64,),
        "blocks.0.ls1.gamma": (64,),
        "blocks.0.norm2.weight": (64,),
        "blocks.0.norm2.bias": (64,),
        "blocks.0.mlp.w12.weight": (352, 64),
        "blocks.0.mlp.w12.bias": (352,),
        "blocks.0.mlp.w3.weight": (64, 176),
        "blocks.0.mlp.w3.bias": (64,),
        "blocks.0.ls2.gamma": (64,),
        "norm.weight": (64,),
        "norm.bias": (64,),
    }


def test_keys_of_a_plain_mlp_model():
    keys = VisionTransformer(image_px=28, embed_dim=64, depth=2, num_heads=1).state_dict()

    assert "register_tokens" not in keys
    assert [key for key in keys if key.startswith("blocks.1.mlp")] == [
        "blocks.1.mlp.fc1.weight",
        "blocks.1.mlp.fc1.bias",
        "blocks.1.mlp.fc2.weight",
        "blocks.1.mlp.fc2.bias",
    ]


def test_start_values_are_those_of_dinov2_training():
    model = VisionTransformer(embed_dim=384, depth=2, num_heads=6, num_registers=4)
    state = model.state_dict()

    for key in ("pos_embed", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight"):
        assert abs(state[key].std().item() - 0.02) < 0.02 * 0.01, key  # > 400,000 draws each
    for key in ("cls_token", "register_tokens"):
        assert 0 < state[key].abs().max() < 6e-6, key
    for key in ("mask_token", "blocks.0.attn.qkv.bias", "blocks.0.mlp.fc1.bias", "norm.bias"):
        assert not state[key].any(), key
    assert state["blocks.1.ls2.gamma"].eq(1e-5).all()
    assert state["norm.weight"].eq(1).all()
    bound = (3 * 14 * 14) ** -0.5  # torch's own start of a convolution
    assert 0.99 * bound < state["patch_embed.proj.weight"].abs().max() <= bound
    assert state["patch_embed.proj.bias"].abs().max() <= bound


@pytest.mark.parametrize("variant", VARIANTS)
def test_reset_draws_every_parameter_anew(variant):
    model = tiny_backbone(variant)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))

    model.reset_parameters()

    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_tokens_are_cls_registers_patches_and_registers_have_no_position():
    model = tiny_backbone("mlp_reg", depth=1)
    x = images(2, 56, 56)
    for layer in (model.blocks[0].ls1, model.blocks[0].ls2):
        torch.nn.init.zeros_(layer.gamma)  # the block passes its input on

    tokens = model.forward_features(x)["x_prenorm"]

    assert model.register_tokens is not None
    assert tokens.shape == (2, 1 + 4 + 16, 64)
    assert torch.equal(tokens[:, :1], (model.cls_token + model.pos_embed[:, :1]).expand(2, -1, -1))
    assert torch.equal(tokens[:, 1:5], model.register_tokens.expand(2, -1, -1))
    assert torch.equal(tokens[:, 5:], model.patch_embed(x) + model.pos_embed[:, 1:])


def test_the_mask_token_stands_in_before_the_position_is_added():
    model = tiny_backbone("mlp_reg", depth=1)
    for layer in (model.blocks[0].ls1, model.blocks[0].ls2):
        torch.nn.init.zeros_(layer.gamma)
    x, masks = images(2, 56, 56), torch.zeros(2, 16, dtype=torch.bool)
    masks[0, 3] = masks[1, 0] = True

    features = model.forward_features(x, masks)
    plain = model.forward_features(x)["x_prenorm"]
    tokens = features["x_prenorm"]

    assert features["masks"] is masks
    assert torch.equal(tokens[0, 5 + 3], model.mask_token[0] + model.pos_embed[0, 1 + 3])
    assert torch.equal(tokens[1, 5 + 0], model.mask_token[0] + model.pos_embed[0, 1 + 0])
    changed = (tokens != plain).any(dim=2)
    assert changed.nonzero().tolist() == [[0, 8], [1, 5]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_slices_of_one_normalised_tensor(variant):
    model = tiny_backbone(variant)

    features = model.forward_features(images(2, 28, 42))
    normed = model.norm(features["x_prenorm"])
    registers = model.num_registers

    assert list(features) == [
        "x_norm_clstoken",
        "x_norm_regtokens",
        "x_norm_patchtokens",
        "x_prenorm",
        "masks",
    ]
    assert torch.equal(features["x_norm_clstoken"], normed[:, 0])
    assert torch.equal(features["x_norm_regtokens"], normed[:, 1 : 1 + registers])
    assert torch.equal(features["x_norm_patchtokens"], normed[:, 1 + registers :])
    assert features["x_norm_patchtokens"].shape == (2, 6, 64)
    assert features["masks"] is None
    assert torch.equal(model(images(2, 28, 42)), features["x_norm_clstoken"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pack_of_several_sizes_equals_separate_forwards(variant):
    model = tiny_backbone(variant)
    batches = [images(*size) for size in SIZES]
    mask = torch.arange(2 * 16).view(2, 16) % 3 == 0
    masks = [mask, None, None, None]

    packed = model.forward_features(batches, masks)
    separate = [model.forward_features(x, m) for x, m in zip(batches, masks, strict=True)]
    model.double()
    doubles = [x.double() for x in batches]
    exact = [model.forward_features(x, m) for x, m in zip(doubles, masks, strict=True)]
    exactly_packed = model.forward_features(doubles, masks)

    for key in ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm"):
        for out, alone, truth, double in zip(packed, separate, exact, exactly_packed, strict=True):
            assert_within_error_budget(
                out[key], low_precision=alone[key], truth=truth[key], name=key
            )
            assert_equal_to_rounding(double[key], truth[key], name=key)


def assert_equal_to_rounding(out: torch.Tensor, truth: torch.Tensor, *, name: str) -> None:
    """Equal but for the order of sums: a few roundings for each of the few hundred operations."""
    scale = truth.abs().max() if truth.numel() else torch.tensor(0.0)
    error = (out - truth).abs().max() if truth.numel() else torch.tensor(0.0)
    assert error <= 256 * torch.finfo(truth.dtype).eps * scale, f"{name}: {error} at {scale}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_a_pack_equal_those_of_separate_forwards(variant):
    batches = [images(*size, dtype=torch.float64) for size in SIZES]
    model = tiny_backbone(variant).double()

    def gradients(outs) -> list[torch.Tensor]:
        loss = sum((out["x_prenorm"] * out["x_prenorm"].detach().cos()).sum() for out in outs)
        names = [name for name, _ in model.named_parameters() if name != "mask_token"]
        parameters = [
            dict(model.named_parameters())[name] for name in names if "norm." not in name[:5]
        ]
        return list(torch.autograd.grad(loss, parameters))

    packed = gradients(model.forward_features(batches))
    separate = gradients([model.forward_features(x) for x in batches])

    for out, truth in zip(packed, separate, strict=True):
        assert_equal_to_rounding(out, truth, name=str(tuple(out.shape)))


def test_gradients_reach_positions_through_the_resize():
    model = tiny_backbone()

    model(images(1, 28, 42)).square().sum().backward()

    assert model.pos_embed.grad is not None
    assert (model.pos_embed.grad.abs().sum(dim=2) > 0).all()  # every stored position was sampled


def test_a_poisoned_image_changes_no_other():
    model = tiny_backbone("swiglu_reg")
    batches = [images(2, 56, 56), images(2, 28, 28)]
    poisoned = [batches[0].clone(), batches[1]]
    poisoned[0][1] = float("nan")

    clean, dirty = model.forward_features(batches), model.forward_features(poisoned)

    assert dirty[0]["x_prenorm"][1].isnan().all()
    assert torch.equal(dirty[0]["x_prenorm"][0], clean[0]["x_prenorm"][0])
    assert torch.equal(dirty[1]["x_prenorm"], clean[1]["x_prenorm"])


def test_stochastic_depth_is_off_in_evaluation_and_the_generators_in_training():
    model, plain = tiny_backbone(drop_ratio=0.5), tiny_backbone()
    batches = [images(4, 28, 28), images(6, 14, 14)]

    def run(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        outs = model.forward_features(batches, generator=generator)
        return torch.cat([out["x_prenorm"].flatten() for out in outs])

    undropped = plain.forward_features(batches)
    for out, expected in zip(model.forward_features(batches), undropped, strict=True):
        assert torch.equal(out["x_prenorm"], expected["x_prenorm"])
    model.train()
    first, again, other = run(0), run(0), run(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_stochastic_depth_keeps_the_expected_update():
    # In one block with one branch silenced, the updates sum to b times the mean branch: each
    # kept sample counts b / m = 2 times. Equal images make the sum exact up to rounding.
    model = tiny_backbone(depth=1, drop_ratio=0.5).double().train()
    torch.nn.init.zeros_(model.blocks[0].ls2.gamma)
    x = images(1, 28, 28, dtype=torch.float64).expand(24, -1, -1, -1)

    dropped = model.forward_features(x, generator=torch.Generator())["x_prenorm"]
    full = model.eval().forward_features(x)["x_prenorm"]

    torch.testing.assert_close(dropped.mean(0), full.mean(0), rtol=1e-12, atol=1e-12)
    assert len(dropped.flatten(1).unique(dim=0)) == 2  # kept, twice the update, or skipped


@pytest.mark.parametrize("variant", VARIANTS)
def test_intermediate_layers_are_the_normalised_outputs_of_blocks(variant):
    model = tiny_backbone(variant, depth=4)
    x, registers = images(2, 28, 42), model.num_registers
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, out: seen.append(out.view(2, -1, 64)))

    model(x)
    normed = [model.norm(out) for out in seen]
    taken = model.get_intermediate_layers(x, 2)
    chosen = model.get_intermediate_layers(
        x, [0, -1], return_class_token=True, return_register_tokens=True
    )

    assert len(taken) == 2
    assert all(
        torch.equal(a, b[:, 1 + registers :]) for a, b in zip(taken, normed[2:4], strict=True)
    )
    for (patches, cls_token, regs), expected in zip(chosen, (normed[0], normed[3]), strict=True):
        assert torch.equal(patches, expected[:, 1 + registers :])
        assert torch.equal(cls_token, expected[:, 0])
        assert torch.equal(regs, expected[:, 1 : 1 + registers])


def test_the_last_intermediate_layer_is_the_output():
    model, x = tiny_backbone("mlp_reg"), images(2, 28, 42)
    features = model.forward_features(x)

    ((patches, cls_token),) = model.get_intermediate_layers(x, return_class_token=True)
    (unnormed,) = model.get_intermediate_layers(x, norm=False)

    assert torch.equal(patches, features["x_norm_patchtokens"])
    assert torch.equal(cls_token, features["x_norm_clstoken"])
    assert torch.equal(unnormed, features["x_prenorm"][:, 5:])


def test_intermediate_layers_as_maps():
    model, x = tiny_backbone(), images(2, 28, 42)

    (flat,) = model.get_intermediate_layers(x)
    (maps,) = model.get_intermediate_layers(x, reshape=True)

    assert maps.shape == (2, 64, 2, 3)
    assert maps.is_contiguous()
    assert torch.equal(maps[1, :, 1, 2], flat[1, 1 * 3 + 2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_of_every_layer(variant):
    model = tiny_backbone(variant, num_heads=4, depth=3)
    x = images(2, 28, 42)
    num_tokens = 1 + model.num_registers + 6
    inputs: list[torch.Tensor] = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda _m, _i, out: inputs.append(out))

    model(x)
    projected = [out.view(2, num_tokens, 3, 4, 16).permute(2, 0, 3, 1, 4) for out in inputs]
    for layer, (q, k, _) in enumerate(projected[:3]):
        attention = model.return_attention(x, layer)

        assert attention.shape == (2, 4, num_tokens, num_tokens)
        expected = (q.double() @ k.double().transpose(-2, -1) / 4).softmax(dim=-1)
        low_precision = (q @ k.transpose(-2, -1) / 4).softmax(dim=-1)
        assert_within_error_budget(
            attention, low_precision=low_precision, truth=expected, name=f"layer {layer}"
        )
        assert torch.equal(attention, model.return_attention(x, layer - 3))
    assert torch.equal(model.return_attention(x), model.return_attention(x, 2))


@pytest.mark.parametrize("position_resize", ["official", "antialias"])
def test_any_multiple_of_the_patch_runs_in_both_resize_modes(position_resize):
    model = tiny_backbone(position_resize=position_resize)

    for height, width in ((14, 14), (56, 56), (14, 98), (70, 28), (112, 112)):
        features = model.forward_features(images(1, height, width))
        assert features["x_norm_patchtokens"].shape == (1, height * width // 196, 64)
        assert features["x_prenorm"].isfinite().all()


def test_the_resize_mode_matters_except_at_the_native_size():
    official, antialias = (tiny_backbone(position_resize=m) for m in ("official", "antialias"))

    assert torch.equal(official(images(1, 56, 56)), antialias(images(1, 56, 56)))
    assert not torch.equal(official(images(1, 28, 28)), antialias(images(1, 28, 28)))


def test_bf16_autocast_keeps_the_residual_stream_in_float32():
    model = tiny_backbone("swiglu_reg", drop_ratio=0.5).train()
    batches = [images(2, 28, 28), images(4, 14, 14)]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = model.forward_features(batches, generator=torch.Generator())

    assert all(out["x_prenorm"].dtype == torch.float32 for out in outs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_runs_in_its_own_dtype(dtype):
    model = tiny_backbone("swiglu_reg").to(dtype)

    out = model(images(2, 28, 42, dtype=dtype))

    assert out.dtype == dtype
    assert out.isfinite().all()


def test_compiles_fullgraph():
    model = tiny_backbone("swiglu_reg")
    batches = [images(2, 56, 56), images(3, 28, 28)]

    compiled = torch.compile(model.forward_features, fullgraph=True, backend="eager")

    for out, expected in zip(compiled(batches), model.forward_features(batches), strict=True):
        # Traced, a block is plain operations; run, it is one node with kernels of its own.
        torch.testing.assert_close(out["x_prenorm"], expected["x_prenorm"])


def test_exports():
    model, x = tiny_backbone("swiglu_reg"), images(2, 28, 42)

    exported = torch.export.export(model, (x,)).module()

    torch.testing.assert_close(exported(x), model(x))


def test_other_channels():
    model = VisionTransformer(image_px=28, in_channels=5, embed_dim=64, depth=1, num_heads=1)

    assert model(randn(2, 5, 28, 28)).shape == (2, 64)


def test_rejects_bad_input():
    model, x = tiny_backbone(), images(2, 28, 42)

    with pytest.raises(ValueError, match="multiples of the patch size 14, got 28 x 43"):
        model(torch.zeros(1, 3, 28, 43))
    with pytest.raises(ValueError, match=r"expected masks \(2, 6\) of torch.bool, got \(2, 5\)"):
        model.forward_features(x, torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got \(2, 6\) of torch.float32"):
        model.forward_features(x, torch.zeros(2, 6))
    with pytest.raises(ValueError, match="masks for 2 batches, got 1; use None"):
        model.forward_features([x, x], [None])
    for n in (0, 3, [2], [-3], []):
        with pytest.raises(ValueError, match="layers: expected the last 1 to 2 blocks"):
            model.get_intermediate_layers(x, n)
    with pytest.raises(ValueError, match=r"layers: .* got \[5\]"):
        model.return_attention(x, 5)
