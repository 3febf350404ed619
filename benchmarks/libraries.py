"""Products of float32 matrices by libraries that the package does not ask for: one thread each.

torch multiplies float32 matrices by what it was built with, MKL on x86. NumPy's wheels bring
OpenBLAS, and torch's own copy of oneDNN, which it takes for bfloat16, is called here directly.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LIBRARIES = ("OpenBLAS", "oneDNN")

_MAPS = Path("/proc/self/maps")
_SET_THREADS = ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads")


def why_no_library(name: str) -> str:
    """Empty when a library can be called here on one thread, else why not.

    Args:
        name: one of `LIBRARIES`.
    """
    if name == "oneDNN" and not torch.backends.mkldnn.is_available():
        return "torch was built without oneDNN"
    if name == "OpenBLAS" and not _MAPS.exists():
        return f"NumPy's copy of OpenBLAS is looked for in {_MAPS}, which only Linux has"
    if name == "OpenBLAS" and _set_openblas_threads() is None:
        return "NumPy was built without OpenBLAS"
    return ""


def product_by(name: str, left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    """A function that multiplies two float32 matrices by a library.

    Args:
        name: one of `LIBRARIES`, of which `why_no_library` says nothing.
        left: [M, K], any strides.
        right: [K, N], any strides.
    Returns:
        What computes [M, N] into new memory, as torch does.
    """
    if name == "oneDNN":
        linear, transposed = torch.ops.mkldnn._linear_pointwise, right.t()
        return lambda: linear(left, transposed, None, "none", [], None)
    set_threads = _set_openblas_threads()
    assert set_threads is not None
    set_threads(1)
    operands = left.numpy(), right.numpy()
    return lambda: torch.from_numpy(np.matmul(*operands))


def _set_openblas_threads() -> Callable[[int], object] | None:
    """OpenBLAS's function in the copy that NumPy loaded; None if there is no such copy."""
    for line in _MAPS.read_text(encoding="utf-8").splitlines():
        path = line.split(maxsplit=5)[-1]
        if "openblas" in path and "numpy" in path:
            library = ctypes.CDLL(path)
            found = [getattr(library, name, None) for name in _SET_THREADS]
            return next(filter(None, found), None)
    return None
