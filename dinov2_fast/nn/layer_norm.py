"""Layer normalisation over channels, optionally of chosen rows only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2_fast.ops.layer_norm import layer_norm


class LayerNorm(nn.Module):
    """`torch.nn.LayerNorm` over the last dimension that can read a subset of rows.

    Args:
        dim: C, channels.
        eps: added to the variance.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as a plain normalisation: weight 1, bias 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, *, rows: Tensor | None = None) -> Tensor:
        """Normalise x [..., C], or only `rows` [R] of x [T, C].

        Args:
            x: [..., C]; [T, C] when rows are given.
            rows: [R] int64, rows of x to take; None takes all.
        Returns:
            The shape of x, or [R, C].
        """
        return layer_norm(x, self.weight, self.bias, eps=self.eps, rows=rows)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
