"""Full names of the layer types whose arithmetic the fast paths know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch.nn.functional as F
from torch import nn

from dinov2_fast.drop_in.half_block import Part

LINEAR = frozenset({"torch.nn.modules.linear.Linear"})
IDENTITY = frozenset({"torch.nn.modules.linear.Identity"})
DROPOUT = frozenset({"torch.nn.modules.dropout.Dropout"})
LAYER_NORM = frozenset({"torch.nn.modules.normalization.LayerNorm"})
GELU = frozenset({"torch.nn.modules.activation.GELU", "transformers.activations.GELUActivation"})
SILU = frozenset({"torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation"})


def layer_of(module: nn.Module, name: str) -> nn.Linear:
    """A module's Linear layer, or what stands in its place: `why_left` looks before anyone uses it.

    Args:
        module: where it is.
        name: its attribute.
    """
    return cast(nn.Linear, getattr(module, name, None))


def ratio_of(drop_path: nn.Module) -> float:
    """The share of samples that timm's or transformers' drop path drops in training.

    Args:
        drop_path: or the Identity in its place, whose attribute lookup would be slow to fail.
    """
    return vars(drop_path).get("drop_prob", 0.0)


def parts_of(block: nn.Module, known: Mapping[str, frozenset[str]]) -> tuple[Part, ...]:
    """The modules of a block that a table names.

    Args:
        block: whose submodules they are.
        known: name of a submodule -> full names of the types it may have.
    Returns:
        Those the block has; versions of a library differ in the Identity layers they contain.
    """
    parts: list[Part] = []
    for name, types in known.items():
        module = block
        for step in name.split("."):
            module = module._modules.get(step) if isinstance(module, nn.Module) else None
        if module is not None:
            parts.append((name, module, types))
    return tuple(parts)


def gelu_difference(activation: nn.Module | None) -> str:
    """Why an activation is not the exact GELU, or ""."""
    if getattr(activation, "approximate", "none") != "none":
        return "the activation is an approximate GELU"
    function = getattr(activation, "act", F.gelu)  # of transformers' GELUActivation
    return "" if function is F.gelu else "the activation is not torch's GELU"
