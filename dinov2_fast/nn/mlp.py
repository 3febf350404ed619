"""The two-layer perceptron of a transformer block."""

from __future__ import annotations

from torch import Tensor, nn

from dinov2_fast.nn.linear import Linear
from dinov2_fast.ops.gelu import gelu


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
        self.fc1 = Linear(in_features, hidden_features or in_features, bias=bias)
        self.fc2 = Linear(hidden_features or in_features, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., C] token by token."""
        hidden = self.fc1(x)
        activation = gelu(hidden.view(-1, hidden.shape[-1]))  # [R, F]
        return self.fc2(activation.view(hidden.shape))
