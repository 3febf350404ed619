"""Fast and lean DINOv2: training, evaluation and the layers it is built from.

Submodules load on first use, so that `import dinov2_fast` costs little more than `import torch`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_SUBMODULES = (
    "backends",
    "config",
    "data",
    "distributed",
    "doctor",
    "drop_in",
    "environment",
    "errors",
    "evaluation",
    "features",
    "losses",
    "models",
    "native",
    "nn",
    "ops",
    "packing",
    "report",
    "train",
)

# Name every user needs -> the submodule that defines it.
_NAMES = {
    "Pack": "packing",
    "accelerate": "drop_in",
    "restore": "drop_in",
    "use_backend": "backends",
}

if TYPE_CHECKING:
    from dinov2_fast.backends import use_backend as use_backend
    from dinov2_fast.drop_in import accelerate as accelerate
    from dinov2_fast.drop_in import restore as restore
    from dinov2_fast.packing import Pack as Pack

__all__ = ["Pack", "__version__", "accelerate", "restore", "use_backend"]


def __getattr__(name: str) -> Any:
    """Load a submodule, or one of the names every user needs, on first use."""
    if name in _SUBMODULES:
        return importlib.import_module(f"dinov2_fast.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"dinov2_fast.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'dinov2_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Names for completion, lazy ones included."""
    return sorted([*__all__, *_SUBMODULES])
