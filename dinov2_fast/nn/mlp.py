"""The two-layer perceptron of a transformer block."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Mlp(nn.Module):
    """Linear, exact GELU, Linear.

    Args:
        in_features: C, channels of the input.
        hidden_features: F; None takes in_features.
        out_features: channels of the output; None takes in_features.
        bias: whether both layers have a bias.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features or in_features, bias=bias)
        self.fc2 = nn.Linear(hidden_features or in_features, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., C] token by token."""
        return self.fc2(F.gelu(self.fc1(x)))
