"""The last block computes only rows that are read: exactly those of the whole forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_fast.models import VisionTransformer
from tests.inputs import randn, randperm

GLOBAL, LOCAL = (4, 42), (6, 28)  # images and side: 9 and 4 patches of 14 pixels


def backbone(ffn: str, drop_ratio: float) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        image_px=42,
        embed_dim=32,
        depth=2,
        num_heads=2,
        ffn=ffn,
        num_registers=1,
        drop_ratio=drop_ratio,
        layer_scale=0.5,
    )
    return model.double().train()


def crops() -> list[Tensor]:
    return [randn(count, 3, px, px, dtype=torch.float64) for count, px in (GLOBAL, LOCAL)]


def picked(model: VisionTransformer, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The same tokens out of the whole forward pass."""
    generator = torch.Generator().manual_seed(1)
    features = model.forward_features(crops(), [None, None], generator=generator)
    patches = features[0]["x_norm_patchtokens"].flatten(0, 1)[indices]
    return torch.cat([group["x_norm_clstoken"] for group in features]), patches


def gradients(model: VisionTransformer, outputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    loss = sum((out * randn(*out.shape, seed=2)).sum() for out in outputs)
    wanted = [p for name, p in model.named_parameters() if name != "mask_token"]
    return list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("drop_ratio", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("num_patches", [11, 0, 36], ids=["some", "none", "all"])
def test_selected_tokens_and_gradients_are_those_of_the_whole(ffn, drop_ratio, num_patches):
    model, indices = backbone(ffn, drop_ratio), randperm(36)[:num_patches].sort().values

    selected = model.forward_selected(
        crops(), [None, None], indices, torch.Generator().manual_seed(1)
    )
    expected = picked(model, indices)

    for out, whole in zip(selected, expected, strict=True):
        torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
    pairs = zip(gradients(model, selected), gradients(model, expected), strict=True)
    for gradient, whole in pairs:
        torch.testing.assert_close(gradient, whole, rtol=1e-9, atol=1e-11)


def test_the_last_block_computes_no_other_row(monkeypatch):
    from dinov2_fast.ops import _matmul

    rows: list[int] = []
    linear = _matmul.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows.append(x.shape[0])
        return linear(x, weight, bias)

    monkeypatch.setattr(_matmul, "linear", counted)
    model, indices = backbone("mlp", 0.0), randperm(36)[:7].sort().values
    model.forward_selected(crops(), [None, None], indices)

    tokens, read = 4 * 11 + 6 * 6, 10 + 7
    assert rows == [tokens] * 4 + [read, tokens, read, read, read]
