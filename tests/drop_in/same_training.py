"""An accelerated copy of a model, and whether it trains as the original does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast import accelerate


def original_and_fast(model: nn.Module) -> tuple[Any, Any]:
    """A model, and an accelerated copy whose drop path asks the library's."""
    fast = copy.deepcopy(model)
    accelerate(fast, drop_path="masked")
    return model, fast


def tensors_of(out: Any) -> Iterator[Tensor]:
    """The tensors of a nested output, in order."""
    if isinstance(out, Tensor):
        yield out
    elif out is not None:
        for part in out.values() if isinstance(out, dict) else out:
            yield from tensors_of(part)


def assert_close(found: Any, expected: Any) -> None:
    """Equal up to rounding, tensor by tensor."""
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    assert pairs
    for one, other in pairs:
        assert (one - other).norm() <= 1e-5 * other.norm()


def assert_same_training(models: tuple[Any, Any], call: Any) -> None:
    """Outputs, and gradients of the sum of their squares, with the same draws."""
    outputs, gradients = [], []
    for model in models:
        torch.manual_seed(4)
        model.zero_grad()
        outputs.append(list(tensors_of(call(model))))
        sum(out.square().sum() for out in outputs[-1]).backward()
        named = model.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
    assert_close(outputs[1], outputs[0])
    assert gradients[1].keys() == gradients[0].keys()
    for name, expected in gradients[0].items():
        if not name.endswith("k_proj.bias"):  # exactly zero: softmax does not see it
            assert (gradients[1][name] - expected).norm() <= 1e-5 * max(expected.norm(), 1), name
