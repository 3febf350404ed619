"""Backbones for tests, with weights of which none is at its start value or zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2_fast.models import VisionTransformer, create_model

VARIANTS = ["mlp", "swiglu", "mlp_reg", "swiglu_reg"]


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw all parameters so that a wrong place, order or transposition changes the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=generator)
            if name.endswith(("gamma", "norm1.weight", "norm2.weight", "norm.weight")):
                parameter.mul_(0.2).add_(1)
            elif parameter.ndim in (2, 4) and name != "mask_token":
                parameter.mul_(parameter[0].numel() ** -0.5)
            else:
                parameter.mul_(0.2)


def tiny_backbone(variant: str = "mlp", **options) -> VisionTransformer:
    """The debug architecture at native 56 px (a 4 x 4 grid) with random weights, in evaluation."""
    ffn, _, registers = variant.partition("_")
    settings = {"image_px": 56, "ffn": ffn, "num_registers": 4 if registers else 0, **options}
    model = create_model("debug", **settings).eval()
    randomise(model)
    return model


def states_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys, types and bits."""
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key])
        for key in first
    )
