"""Small models of every library that `accelerate` knows, and one measure to compare them by."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_fast.drop_in import limits
from dinov2_fast.ops.stochastic_depth import draw_kept_rows
from dinov2_fast.packing import Pack
from tests.drop_in import official_model
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget

# Two heads of 64, the width of every published model, and two blocks: enough for a stream.
WIDTH, HEADS, DEPTH = 128, 2, 2
BATCH = 5  # of which 2 or 3 stay at a drop ratio of 0.4
DROP_RATIO = 0.4

THIRD_PARTY = [  # imports warn about their own futures
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

_TIMM = {
    "timm dinov2": ("vit_small_patch14_dinov2", 28, {"init_values": 0.5}),
    "timm reg4": ("vit_small_patch14_reg4_dinov2", 28, {"init_values": 0.5}),
    "timm swiglu": ("vit_giant_patch14_dinov2", 28, {"init_values": 0.5}),
    "timm plain": ("vit_small_patch16_224", 32, {}),
    "timm deit3": ("deit3_small_patch16_224", 32, {"init_values": 0.5}),
}
_TRANSFORMERS = {
    "hf dinov2": ("Dinov2", {}),
    "hf swiglu": ("Dinov2", {"use_swiglu_ffn": True}),
    "hf registers": ("Dinov2WithRegisters", {"num_register_tokens": 4}),
}
_OFFICIAL = {
    "official": official_model.Mlp,
    "official swiglu": official_model.SwiGLUFFNFused,
}
_SHIPPED = limits.limits_of
ANY_SIZE = limits.Limits(owned_tokens=0, owned_work=0, saved_work=-math.inf)
KINDS = [*_TIMM, *_TRANSFORMERS, *_OFFICIAL]
ONE_OF_EACH = ["timm dinov2", "hf dinov2", "official"]


def own_memory_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small batches of a test take the path of large ones."""
    monkeypatch.setattr(limits, "limits_of", lambda _: ANY_SIZE)


def own_memory_as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the size of a batch decide again."""
    monkeypatch.setattr(limits, "limits_of", _SHIPPED)


def make(kind: str, drop_ratio: float = 0.0, depth: int = DEPTH) -> nn.Module:
    """A model in training with weights that let every layer matter."""
    torch.manual_seed(0)
    if kind in _TIMM:
        timm = pytest.importorskip("timm", reason="timm is not installed")
        name, px, options = _TIMM[kind]
        options |= {"embed_dim": WIDTH, "num_heads": HEADS, "depth": depth, "num_classes": 3}
        model = timm.create_model(name, img_size=px, drop_path_rate=drop_ratio, **options)
    elif kind in _TRANSFORMERS:
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        logging.getLogger("transformers").setLevel(logging.ERROR)
        name, options = _TRANSFORMERS[kind]
        config = getattr(transformers, f"{name}Config")(
            hidden_size=WIDTH,
            num_hidden_layers=depth,
            num_attention_heads=HEADS,
            image_size=28,
            patch_size=14,
            layerscale_value=0.5,
            drop_path_rate=drop_ratio,
            **options,
        )
        model = getattr(transformers, f"{name}Model")(config)
    else:
        model = official_model.DinoVisionTransformer(
            WIDTH, HEADS, depth, _OFFICIAL[kind], drop_ratio
        )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            ones = ("norm" in name and name.endswith("weight")) * 1.0
            parameter.copy_(ones + noise * (0.1 if parameter.ndim == 1 else 0.05))
    return model.train()


def images(kind: str, batch: int = BATCH) -> Tensor:
    """Pictures of the size the model takes."""
    px = _TIMM[kind][1] if kind in _TIMM else 28
    return randn(batch, 3, px, px, seed=2)


def run(model: nn.Module, x: Tensor) -> Tensor:
    """The model's main output as one tensor."""
    out = model(x)
    return out if isinstance(out, Tensor) else out.last_hidden_state


def blocks_of(model: Any) -> Any:
    """The list of transformer blocks."""
    return model.blocks if hasattr(model, "blocks") else model.encoder.layer


def outputs_and_gradients(model: nn.Module, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Output, and gradients of input and parameters, with the global generator at a seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = run(model, x)
    (out * randn(*out.shape, seed=3).to(out.dtype)).sum().backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "input": x.grad, **named}  # pyright: ignore[reportReturnType]


def assert_equal_to_original(
    make_fast: Callable[[nn.Module], object], model: nn.Module, x: Tensor
) -> nn.Module:
    """Accelerate a copy and hold it to the error of the original against its float64 self.

    Returns:
        The accelerated copy.
    """
    fast = copy.deepcopy(model)
    make_fast(fast)
    found, original = (outputs_and_gradients(each, x) for each in (fast, model))
    truth = outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    assert found.keys() == original.keys() == truth.keys()
    for name, expected in truth.items():
        if name.endswith("k_proj.bias"):  # exactly zero: softmax does not see it
            assert found[name].abs().max() <= 1e-3 * found["out"].abs().max()
            continue
        assert_within_error_budget(
            found[name], low_precision=original[name], truth=expected, name=name
        )
    return fast


def keep_the_samples_that_subset_keeps(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """Let the library's drop path mask out what the fast path does not compute."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        kept = draw_kept_rows(Pack.from_groups([(len(x), 1)]), self.drop_prob, None)
        assert kept is not None
        factors = x.new_zeros(len(x)).index_put((kept.rows,), kept.row_scale.to(x.dtype))
        return x * factors.view(-1, *[1] * (x.ndim - 1))

    for kind in {type(m) for m in model.modules() if hasattr(m, "drop_prob")}:
        forward.__module__ = kind.__module__  # as if the library had written it
        monkeypatch.setattr(kind, "forward", forward)
