"""What a call of a module does besides its class's arithmetic: hooks, and types by autocast."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def has_hooks(module: nn.Module, *, idle: str = "") -> bool:
    """Whether calling a module does more, or something else, than its class says.

    Args:
        module: looked at without its children.
        idle: name of the Python module whose functions do not count as forward hooks.
    Returns:
        True with hooks of its own or of all modules, or a `forward` set on the instance.
    """
    hooks = module._forward_hooks
    if hooks and idle:
        hooks = [hook for hook in hooks.values() if getattr(hook, "__module__", "") != idle]
    return bool(
        hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or torch.nn.modules.module._has_any_global_hook()
    )


def compute_dtype(x: Tensor) -> torch.dtype | None:
    """The type autocast asks activations to have; None is that of x."""
    device_type = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device_type):  # which knows no meta device
        return None
    return torch.get_autocast_dtype(device_type)
