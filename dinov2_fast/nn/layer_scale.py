"""One learnt factor per channel on a residual branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast.nn.input_forms import run_token_by_token


class LayerScale(nn.Module):
    """Multiply channels by a learnt vector.

    Args:
        dim: C, channels.
        init_values: value of every factor before training.
        inplace: whether a tensor is scaled in its own memory; one in a list never is.
    Source: "Going deeper with Image Transformers" (CaiT), arXiv 2103.17239.
    """

    def __init__(self, dim: int, init_values: float = 1e-5, inplace: bool = False) -> None:
        super().__init__()
        self.init_values = init_values
        self.inplace = inplace
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor to `init_values`."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor, pack: Any = None) -> Tensor:
        """Scale channels.

        Args:
            x: [..., C], [T, C] with a pack, or a list of [..., C].
            pack: layout of [T, C], which makes no difference.
        Returns:
            The shape of x, a list for a list. torch.jit.script, which takes annotations at their
            word, sees tensors alone.
        """
        if not torch.jit.is_scripting() and (  # pyright: ignore[reportPrivateImportUsage]
            pack is not None or not isinstance(x, Tensor)
        ):
            return run_token_by_token(self.forward, x, pack, name="layer_scale")
        return x.mul_(self.gamma) if self.inplace else x * self.gamma

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.gamma.shape[0]}, init_values={self.init_values}"
