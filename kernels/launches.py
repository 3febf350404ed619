"""How the kernels of every op are launched: at once, or into a graph that torch traces."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.library import wrap_triton

# Whether the kernels are Triton's interpreter's: plain Python, which no graph can hold.
INTERPRETED: bool = triton.knobs.runtime.interpret


def launchable(kernel: Any, like: Tensor) -> Any:
    """The kernel, or while torch traces a graph, what puts its launches into that graph.

    Args:
        kernel: made by triton.jit.
        like: a tensor that it is launched with.
    """
    return wrap_triton(kernel) if isinstance(like, FunctionalTensor) else kernel


def programs_of(num_blocks: int, most: int) -> int:
    """Programs that blocks of rows are shared out to, and partial sums that torch adds up.

    Never one: of a tensor whose size is computed, a graph asks whether there is but one row, and
    serves no other number. A program without rows adds zeros.

    Args:
        num_blocks: blocks of rows, at least 1; a symbol while torch traces.
        most: programs that fill a GPU.
    """
    return torch.sym_max(2, torch.sym_min(num_blocks, most))
