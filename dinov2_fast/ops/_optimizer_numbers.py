"""Numbers of an optimizer's step that may change in every step: on the host or on the device."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from dinov2_fast.ops._native_cpu import on_cuda

Number: TypeAlias = Tensor | float


def read_by_host(value: Number) -> Any:
    """A number as it is, and that of a tensor on the CPU; one on a GPU stays there, in float64.

    Args:
        value: a number or a 0-d tensor.
    """
    if not isinstance(value, Tensor):
        return value
    return value.double() if on_cuda(value) else value.item()


def changing_numbers(
    like: Tensor,
    *,
    lr: Number,
    weight_decay: Number,
    beta1: float,
    beta2: float,
    step: Number,
    momentum: Number,
    **frozen: float,
) -> Tensor | None:
    """What a step's numbers come to, computed on the device, or None if the host knows them all.

    Args:
        like: a tensor on the device.
        lr: as all others, an argument of `adamw_ema_step`, read by `read_by_host`.
        weight_decay: see above.
        beta1: see above.
        beta2: see above.
        step: see above.
        momentum: see above.
        frozen: numbers that the step takes as they are.
    Returns:
        1 - lr weight_decay, lr / (1 - beta1^step), sqrt(1 - beta2^step) and 1 - momentum, [4]
        float64.
    """
    del frozen
    numbers = (lr, weight_decay, step, momentum)
    if not any(isinstance(number, Tensor) for number in numbers):
        return None
    rate, decay, count, kept = (
        x if isinstance(x, Tensor) else like.new_full((), x, dtype=torch.float64) for x in numbers
    )
    corrections = 1 - beta1**count, 1 - beta2**count
    return torch.stack([1 - rate * decay, rate / corrections[0], corrections[1].sqrt(), 1 - kept])


def known_numbers(numbers: dict[str, Any]) -> dict[str, float]:
    """Numbers by name, with 1 in place of those that are on the device."""
    return {name: 1 if isinstance(x, Tensor) else x for name, x in numbers.items()}
