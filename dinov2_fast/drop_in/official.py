"""Blocks of DINOv2's published code, and of the many copies of its layers in other projects.

Copies stand under names that cannot be listed, so types are known by their class name and every
block is tried on a few tokens before it is exchanged: `computes_the_same`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from dinov2_fast.drop_in.fast_block import FastBlock
from dinov2_fast.drop_in.half_block import HalfBlock, full_name
from dinov2_fast.drop_in.known_types import (
    DROPOUT,
    GELU,
    LAYER_NORM,
    LINEAR,
    gelu_difference,
    layer_of,
    parts_of,
)

BLOCK_NAMES = {"Block", "NestedTensorBlock"}

_ATTENTION_NAMES = {"Attention", "MemEffAttention"}
_FEED_FORWARD_NAMES = {"Mlp", "SwiGLUFFN", "SwiGLUFFNFused"}
_ATTENTION = {
    "norm1": LAYER_NORM,
    "attn.qkv": LINEAR,
    "attn.attn_drop": DROPOUT,
    "attn.proj": LINEAR,
    "attn.proj_drop": DROPOUT,
}
_FEED_FORWARD = {
    "norm2": LAYER_NORM,
    "mlp.fc1": LINEAR,
    "mlp.act": GELU,
    "mlp.fc2": LINEAR,
    "mlp.drop": DROPOUT,
    "mlp.w12": LINEAR,
    "mlp.w3": LINEAR,
}
_TRIAL_TOKENS = 5


class FastOfficialBlock(FastBlock):
    """A block of DINOv2's published code; lists of batches need no xFormers."""

    takes_lists = True

    @staticmethod
    def halves(block: nn.Module) -> tuple[HalfBlock, HalfBlock]:
        """See `FastBlock.halves`."""
        return _attention_half(block), _feed_forward_half(block)

    @staticmethod
    def drop_ratio(block: Any) -> float:
        """See `FastBlock.drop_ratio`."""
        return block.sample_drop_ratio


def is_official_block(module: nn.Module, kind: type) -> bool:
    """Whether a module, of this class before anything was exchanged, looks like DINOv2's block."""
    attributes = ("norm1", "attn", "ls1", "norm2", "mlp", "ls2", "sample_drop_ratio")
    return kind.__name__ in BLOCK_NAMES and all(hasattr(module, a) for a in attributes)


@torch.no_grad()
def computes_the_same(block: nn.Module) -> bool:
    """Whether a block is what its names say, tried on a few tokens in float64 on the CPU.

    Args:
        block: as its library wrote it.
    Returns:
        Whether both halves, computed by formula, equal the block's own output.
    """
    trial: Any = copy.deepcopy(block).to("cpu", torch.float64).eval()
    width = trial.norm1.weight.shape[0]
    x = torch.sin(torch.arange(2 * _TRIAL_TOKENS * width, dtype=torch.float64)).view(
        2, _TRIAL_TOKENS, width
    )
    expected, out = trial(x), x
    for half in FastOfficialBlock.halves(trial):
        out = out + _by_formula(half, out)
    return torch.allclose(out, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def _by_formula(half: HalfBlock, x: torch.Tensor) -> torch.Tensor:
    """What the owned path computes of [B, N, C], in plain PyTorch."""
    hidden = half.first[0](half.norm(x))
    if half.kind == "attention":
        shape = (*x.shape[:2], 3, half.num_heads, half.head_dim)
        q, k, v = hidden.view(shape).permute(2, 0, 3, 1, 4)  # [B, H, N, D] each
        weights = (q @ k.transpose(-2, -1) * half.head_dim**-0.5).softmax(-1)
        hidden = (weights @ v).transpose(1, 2).flatten(2)
    elif half.kind == "swiglu":
        gate, value = hidden.chunk(2, dim=-1)
        hidden = nn.functional.silu(gate) * value
    else:
        hidden = nn.functional.gelu(hidden)
    branch = half.second(hidden)
    return branch if half.gamma is None else branch * half.gamma


def _attention_half(block: Any) -> HalfBlock:
    attention = block.attn
    num_heads = getattr(attention, "num_heads", 1)
    difference = ""
    if type(attention).__name__ not in _ATTENTION_NAMES:
        difference = f"attn is a {full_name(type(attention))}"
    return HalfBlock(
        kind="attention",
        norm=block.norm1,
        first=(layer_of(attention, "qkv"),),
        second=layer_of(attention, "proj"),
        gamma=getattr(block.ls1, "gamma", None),
        layer_scale=block.ls1,
        drop_path=block.drop_path1,
        drop_ratio=block.sample_drop_ratio,
        inner=attention,
        parts=(*parts_of(block, _ATTENTION), *_own_parts(block, "attn", "ls1", "drop_path1")),
        difference=difference,
        num_heads=num_heads,
        head_dim=block.norm1.weight.shape[0] // num_heads,
    )


def _feed_forward_half(block: Any) -> HalfBlock:
    layers = block.mlp
    gated = hasattr(layers, "w12")
    difference = "" if gated else gelu_difference(getattr(layers, "act", None))
    if type(layers).__name__ not in _FEED_FORWARD_NAMES:
        difference = f"mlp is a {full_name(type(layers))}"
    return HalfBlock(
        kind="swiglu" if gated else "gelu",
        norm=block.norm2,
        first=(layer_of(layers, "w12" if gated else "fc1"),),
        second=layer_of(layers, "w3" if gated else "fc2"),
        gamma=getattr(block.ls2, "gamma", None),
        layer_scale=block.ls2,
        drop_path=block.drop_path2,
        drop_ratio=block.sample_drop_ratio,
        inner=layers,
        parts=(*parts_of(block, _FEED_FORWARD), *_own_parts(block, "mlp", "ls2", "drop_path2")),
        difference=difference,
    )


def _own_parts(block: nn.Module, *names: str) -> tuple[Any, ...]:
    """Modules of DINOv2's own classes, as parts of the types they have: only hooks count."""
    found = [(name, getattr(block, name)) for name in names]
    return tuple((name, part, frozenset({full_name(type(part))})) for name, part in found)
