"""One learnt factor per channel on a residual branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """Multiply channels by a learnt vector.

    Args:
        dim: C, channels.
        init_value: value of every factor before training.
    Source: "Going deeper with Image Transformers" (CaiT), arXiv 2103.17239.
    """

    def __init__(self, dim: int, *, init_value: float = 1e-5) -> None:
        super().__init__()
        self.init_value = init_value
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor to `init_value`."""
        nn.init.constant_(self.gamma, self.init_value)

    def forward(self, x: Tensor) -> Tensor:
        """Scale x [..., C]."""
        return x * self.gamma

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.gamma.shape[0]}, init_value={self.init_value}"
