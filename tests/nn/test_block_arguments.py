"""DINOv2's block by its own arguments: keys, lists of batches, attention, what it refuses."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dinov2_fast.nn import Block, Mlp, NestedTensorBlock, SwiGLUFFN, SwiGLUFFNFused
from dinov2_fast.packing import pack_tokens
from tests.inputs import randn
from tests.nn.blocks import make_block

NORM = partial(nn.LayerNorm, eps=1e-6)
# As DINOv2's vision transformer makes its blocks.
OFFICIAL = {"qkv_bias": True, "init_values": 0.7, "norm_layer": NORM}


def block(**options) -> NestedTensorBlock:
    torch.manual_seed(0)
    return NestedTensorBlock(32, 2, **{**OFFICIAL, **options})


@pytest.mark.parametrize(("ffn", "layer"), [("mlp", Mlp), ("swiglu", SwiGLUFFNFused)])
def test_keys_and_outputs_are_those_of_block(ffn, layer):
    nested, plain = block(ffn_layer=layer), make_block(ffn)
    x = randn(2, 5, 32)

    plain.load_state_dict(nested.state_dict())

    assert torch.equal(nested(x), plain(x))


def test_arguments_mean_what_they_mean_in_dinov2():
    bare = block(qkv_bias=False, proj_bias=False, ffn_bias=False, init_values=None)
    names = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.proj.weight"]
    names += ["norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc2.weight"]

    assert list(bare.state_dict()) == names
    assert NestedTensorBlock(32, 2).norm1.eps == 1e-5  # torch's own default
    assert block(mlp_ratio=2).mlp.fc1.out_features == 64
    assert block(drop_path=0.3).drop_ratio == 0.3
    assert NestedTensorBlock is Block
    assert bare(randn(2, 5, 32)).shape == (2, 5, 32)


@pytest.mark.parametrize("layer", [Mlp, SwiGLUFFN])
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_a_list_of_batches_is_one_pack(drop_path, layer):
    nested = block(ffn_layer=layer, drop_path=drop_path, ffn_bias=False).train()
    batches = [randn(4, 7, 32), randn(3, 2, 32, seed=1)]
    tokens, pack = pack_tokens(batches)

    outs = nested(batches, generator=torch.Generator().manual_seed(0))
    together = nested(tokens, pack, generator=torch.Generator().manual_seed(0))

    assert [out.shape for out in outs] == [batch.shape for batch in batches]
    assert torch.equal(torch.cat([out.flatten(0, 1) for out in outs]), together)


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_checkpointing_draws_the_same_samples_again(drop_path):
    nested, batches = block(drop_path=drop_path).train(), [randn(4, 7, 32), randn(3, 2, 32, seed=1)]
    gradients = []

    for run in (nested, partial(checkpoint, nested, use_reentrant=False)):
        torch.manual_seed(4)
        loss = sum(out.square().sum() for out in run(batches))
        gradients.append(torch.autograd.grad(loss, list(nested.parameters())))

    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("layer", [Mlp, SwiGLUFFN])
def test_under_autocast_to_float16(layer):
    nested, x = block(ffn_layer=layer).train(), randn(3, 5, 32)
    exact = copy.deepcopy(nested).double()
    plain = copy.deepcopy(nested)
    plain.mlp.register_forward_hook(lambda *_: None)  # a hook: module by module, under autograd
    results = []

    for each, of in ((nested, x), (plain, x), (exact, x.double())):
        with torch.autocast("cpu", torch.float16, enabled=each is not exact):
            out = each(of)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(each.parameters()))))

    for found, modules, truth in zip(*results, strict=True):
        errors = [(each.double() - truth).norm() for each in (found, modules)]
        assert errors[0] <= 2 * errors[1] + 1e-3 * truth.norm()


def test_attention_probabilities_instead_of_the_output():
    nested, x = block().eval(), randn(2, 5, 32)
    batches = [x, randn(1, 3, 32, seed=1)]

    weights, of_list = nested(x, return_attention=True), nested(batches, return_attention=True)

    normed = nested.norm1(x)
    q, k, v = nested.attn.qkv(normed).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(-2, -1) / 4).softmax(dim=-1)
    assert (weights - expected).norm() <= 1e-6 * expected.norm()
    assert [each.shape for each in of_list] == [(2, 2, 5, 5), (1, 2, 3, 3)]
    of_pack = nested(*pack_tokens(batches), return_attention=True)
    alone = [nested(batch, return_attention=True) for batch in batches]
    for packed, listed, one in zip(of_pack, of_list, alone, strict=True):
        assert torch.equal(packed, listed)
        assert (listed - one).norm() <= 1e-6 * one.norm()
    out = nested.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    assert (out - nested.attn(normed)).norm() <= 1e-6 * out.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"drop": 0.1},
        {"attn_drop": 0.1},
        {"act_layer": nn.ReLU},
        {"attn_class": nn.MultiheadAttention},
        {"ffn_layer": nn.Linear},
        {"norm_layer": nn.BatchNorm1d},
        {"norm_layer": partial(nn.LayerNorm, elementwise_affine=False)},
        {"drop_path": 1.0},
        {"drop_path": -0.1},
    ],
)
def test_rejects_bad_input(options):
    with pytest.raises(ValueError, match="expected"):
        block(**options)
