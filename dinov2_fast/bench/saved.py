"""Bytes that a forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_bytes(layer: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, without parameters.

    Args:
        layer: whose parameters do not count.
        run: the forward pass, whose output needs a gradient.
    Returns:
        The sum over memory that saved tensors share; they may be FakeTensors.
    """
    known = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(storage.nbytes() for storage in storages.values())
