"""Layers of transformers' Dinov2Model and Dinov2WithRegistersModel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dinov2_fast.drop_in.fast_block import FastBlock
from dinov2_fast.drop_in.half_block import HalfBlock
from dinov2_fast.drop_in.known_types import (
    GELU,
    IDENTITY,
    LAYER_NORM,
    LINEAR,
    SILU,
    gelu_difference,
    layer_of,
    parts_of,
    ratio_of,
)

_PREFIXES = (
    "transformers.models.dinov2.modeling_dinov2.Dinov2",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegisters",
)


def _ours(name: str) -> frozenset[str]:
    """Full names of a class of both models."""
    return frozenset(prefix + name for prefix in _PREFIXES)


BLOCKS = _ours("Layer")

_LAYER_SCALE, _DROP_PATH = _ours("LayerScale"), IDENTITY | _ours("DropPath")
_ATTENTION = {
    "norm1": LAYER_NORM,
    "attention": _ours("Attention"),
    "attention.q_proj": LINEAR,
    "attention.k_proj": LINEAR,
    "attention.v_proj": LINEAR,
    "attention.o_proj": LINEAR,
    "layer_scale1": _LAYER_SCALE,
    "drop_path": _DROP_PATH,
}
_FEED_FORWARD = {
    "norm2": LAYER_NORM,
    "mlp": _ours("MLP") | _ours("SwiGLUFFN"),
    "mlp.fc1": LINEAR,
    "mlp.activation_fn": GELU,
    "mlp.fc2": LINEAR,
    "mlp.gate_proj": LINEAR,
    "mlp.up_proj": LINEAR,
    "mlp.act_fn": SILU,
    "mlp.down_proj": LINEAR,
    "layer_scale2": _LAYER_SCALE,
    "drop_path": _DROP_PATH,
}
# Names of attention functions that compute plain softmax attention.
_PLAIN_ATTENTION = {"sdpa", "eager"}
# Where hooks come from that a call for hidden states or attention weights leaves in every attention
# module for good. They wait for calls for weights, of which each layer is told and runs as it was.
_RECORDING = "transformers.utils.output_capturing"


class FastHuggingFaceLayer(FastBlock):
    """A layer of transformers' Dinov2 models."""

    # Every layer is told them: the first is for hooks on whole layers, the second, which `Trainer`
    # gives, for the loss.
    neutral = frozenset({"output_hidden_states", "num_items_in_batch"})

    @staticmethod
    def halves(block: nn.Module) -> tuple[HalfBlock, HalfBlock]:
        """See `FastBlock.halves`."""
        return _attention_half(block), _feed_forward_half(block)

    @staticmethod
    def drop_ratio(block: Any) -> float:
        """See `FastBlock.drop_ratio`."""
        return ratio_of(block.drop_path)


def _attention_half(layer: Any) -> HalfBlock:
    attention, drop_path = layer.attention, layer.drop_path
    names = ("q_proj", "k_proj", "v_proj")
    head_dim = getattr(attention, "head_dim", 1)
    config = getattr(attention, "config", None)
    function = getattr(config, "_attn_implementation", None)
    difference = ""
    if not all(isinstance(getattr(attention, name, None), nn.Module) for name in names):
        difference = f"attention has not the layers {', '.join(names)} of transformers 5"
    elif function not in _PLAIN_ATTENTION:
        difference = f"attention is computed by {function}"
    elif attention.attention_dropout > 0:
        difference = f"attention drops {attention.attention_dropout:g} of its weights"
    elif attention.scaling != head_dim**-0.5:
        difference = f"attention scales scores by {attention.scaling:g}"

    def inner(x: Tensor) -> Tensor:
        return attention(x)[0]

    return HalfBlock(
        kind="attention",
        norm=layer.norm1,
        first=tuple(layer_of(attention, name) for name in names),
        second=layer_of(attention, "o_proj"),
        gamma=getattr(layer.layer_scale1, "lambda1", None),
        layer_scale=layer.layer_scale1,
        drop_path=drop_path,
        drop_ratio=ratio_of(drop_path),
        inner=inner,
        parts=parts_of(layer, _ATTENTION),
        difference=difference,
        num_heads=getattr(attention, "num_attention_heads", 1),
        head_dim=head_dim,
        idle_hooks="" if getattr(config, "output_attentions", False) else _RECORDING,
    )


def _feed_forward_half(layer: Any) -> HalfBlock:
    layers, drop_path = layer.mlp, layer.drop_path
    gated = hasattr(layers, "gate_proj")
    first = ("gate_proj", "up_proj") if gated else ("fc1",)
    return HalfBlock(
        kind="swiglu" if gated else "gelu",
        norm=layer.norm2,
        first=tuple(layer_of(layers, name) for name in first),
        second=layer_of(layers, "down_proj" if gated else "fc2"),
        gamma=getattr(layer.layer_scale2, "lambda1", None),
        layer_scale=layer.layer_scale2,
        drop_path=drop_path,
        drop_ratio=ratio_of(drop_path),
        inner=layers,
        parts=parts_of(layer, _FEED_FORWARD),
        difference="" if gated else gelu_difference(getattr(layers, "activation_fn", None)),
    )
