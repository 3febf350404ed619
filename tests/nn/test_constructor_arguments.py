"""Constructor arguments are DINOv2's: names, order and defaults, and parameters under its keys."""

from __future__ import annotations

import inspect

import pytest
from torch import nn

from dinov2_fast.nn import (
    Attention,
    Block,
    DINOHead,
    DropPath,
    LayerNorm,
    LayerScale,
    Mlp,
    PatchEmbed,
    SwiGLUFFN,
    SwiGLUFFNFused,
)

EMPTY = inspect.Parameter.empty
FEED_FORWARD = {"in_features": EMPTY, "hidden_features": None, "out_features": None}
SWIGLU = {**FEED_FORWARD, "act_layer": None, "drop": 0.0, "bias": True}
# As the published layers have them.
ARGUMENTS = {
    Attention: {
        **{"dim": EMPTY, "num_heads": 8, "qkv_bias": False, "proj_bias": True},
        **{"attn_drop": 0.0, "proj_drop": 0.0},
    },
    Block: {
        **{"dim": EMPTY, "num_heads": EMPTY, "mlp_ratio": 4.0, "qkv_bias": False},
        **{"proj_bias": True, "ffn_bias": True, "drop": 0.0, "attn_drop": 0.0},
        **{"init_values": None, "drop_path": 0.0, "act_layer": nn.GELU},
        **{"norm_layer": nn.LayerNorm, "attn_class": Attention, "ffn_layer": Mlp},
    },
    Mlp: {**FEED_FORWARD, "act_layer": nn.GELU, "drop": 0.0, "bias": True},
    SwiGLUFFN: SWIGLU,
    SwiGLUFFNFused: SWIGLU,
    LayerScale: {"dim": EMPTY, "init_values": 1e-5, "inplace": False},
    DropPath: {"drop_prob": None},
    LayerNorm: {"normalized_shape": EMPTY, "eps": 1e-6, "elementwise_affine": True},
    PatchEmbed: {
        **{"img_size": 224, "patch_size": 16, "in_chans": 3, "embed_dim": 768},
        **{"norm_layer": None, "flatten_embedding": True},
    },
    DINOHead: {
        **{"in_dim": EMPTY, "out_dim": EMPTY, "use_bn": False, "nlayers": 3},
        **{"hidden_dim": 2048, "bottleneck_dim": 256, "mlp_bias": True},
    },
}


@pytest.mark.parametrize("layer", ARGUMENTS, ids=lambda layer: layer.__name__)
def test_positional_arguments_are_those_of_dinov2(layer):
    found = {
        name: parameter.default
        for name, parameter in inspect.signature(layer).parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    }

    assert list(found.items()) == list(ARGUMENTS[layer].items())


def test_no_bias_has_no_key():
    for layer in (Mlp(8, bias=False), SwiGLUFFN(8, bias=False), DINOHead(8, 4, mlp_bias=False)):
        assert not [key for key in layer.state_dict() if "bias" in key]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Mlp(8, drop=0.1), "mlp: expected drop 0, got 0.1"),
        (lambda: Mlp(8, act_layer=nn.ReLU), "mlp: expected act_layer torch.nn.GELU"),
        (lambda: SwiGLUFFN(8, drop=0.1), "swiglu: expected drop 0"),
        (lambda: SwiGLUFFNFused(8, drop=0.1), "swiglu: expected drop 0"),
        (lambda: Attention(8, attn_drop=0.1), "attention: expected attn_drop 0"),
        (lambda: DINOHead(8, 4, use_bn=True), "head: expected use_bn False"),
        (lambda: LayerNorm((4, 8)), "layer_norm: expected normalized_shape of one dimension"),
        (lambda: LayerNorm(8, elementwise_affine=False), "use torch.nn.LayerNorm"),
        (lambda: PatchEmbed(patch_size=(14, 16)), "patch_embed: expected patch_size to be"),
    ],
)
def test_what_nobody_trains_dinov2_with_is_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()
