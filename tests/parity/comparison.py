"""One measure for parity: forward and all gradients of two models with the same weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dinov2_fast.models import VisionTransformer, create_model
from tests.inputs import randn
from tests.models.weights import randomise

# float32; gradients of a dozen blocks collect rounding, forwards are mostly equal to the bit.
MAX_RELATIVE_DIFFERENCE = 1e-5

# The full depth of S, and g with its real width at the depth and size that a test can pay for.
MODELS = {
    "vits14": {},
    "vits14_reg4": {},
    "vitg14": {"depth": 2},
    "vitg14_reg4": {"depth": 2},
}
# Images have the native size of the model, because methods of resizing differ.
NATIVE_PX = {"vits14": 98, "vits14_reg4": 98, "vitg14": 56, "vitg14_reg4": 56}


def backbone(arch: str, **options) -> VisionTransformer:
    """One of `MODELS` with random weights, in evaluation."""
    settings = {"image_px": NATIVE_PX[arch], **MODELS[arch], **options}
    model = create_model(arch, **settings).eval()
    randomise(model)
    return model


def images(arch: str, batch: int = 2) -> Tensor:
    """Images of the model's native size."""
    return randn(batch, 3, NATIVE_PX[arch], NATIVE_PX[arch])


def tokens_and_gradients(model: nn.Module, forward, x: Tensor) -> dict[str, Tensor]:
    """All normalised tokens, and gradients of a weighted sum of them.

    Args:
        model: whose parameters are differentiated; gradients are keyed by their names.
        forward: maps images to [B, N, C].
        x: images.
    Returns:
        `tokens`, `input` and one entry for each parameter that takes part.
    """
    x = x.clone().requires_grad_()
    tokens = forward(x)
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad(set_to_none=True)
    (tokens * weights).sum().backward()
    out = {"tokens": tokens.detach(), "input": x.grad}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out | gradients


def our_tokens(model: VisionTransformer):
    """The forward of a backbone as one tensor [CLS, registers, patches]."""
    return lambda x: model.norm(model.forward_features(x)["x_prenorm"])


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Every tensor agrees to `MAX_RELATIVE_DIFFERENCE` of its largest value."""
    assert ours.keys() == theirs.keys()
    differences = {
        name: ((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item()
        for name in ours
    }
    worst = max(differences, key=lambda name: differences[name])
    assert differences[worst] <= MAX_RELATIVE_DIFFERENCE, (worst, differences[worst])
