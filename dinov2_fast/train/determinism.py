"""The same bits in every run on a GPU, where several operations may otherwise add in any order."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import deterministic


@contextmanager
def deterministic_algorithms(device: torch.device, *, enabled: bool) -> Generator[None, None, None]:
    """Ask PyTorch, cuDNN and this package's kernels for one order of every sum.

    The CPU's operations have one order for a number of threads and are left alone. An operation
    that knows no such order warns and computes; so does cuBLAS unless the process was started with
    CUBLAS_WORKSPACE_CONFIG=:4096:8. What was set before comes back at the end.

    Args:
        device: where the networks live.
        enabled: whether to ask; False leaves everything as the caller set it.
    """
    if device.type != "cuda" or not enabled:
        yield
        return
    asked = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = deterministic  # its type is a module that lacks the property
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=only_warned or not asked)
    memory.fill_uninitialized_memory = False  # no kernel reads what none wrote
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=only_warned)
        memory.fill_uninitialized_memory = filled
