"""The two-layer perceptron of a transformer block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dinov2_fast.nn.dropout import check_no_dropout
from dinov2_fast.nn.input_forms import run_token_by_token
from dinov2_fast.nn.linear import Linear
from dinov2_fast.ops.gelu import gelu
from dinov2_fast.packing import Pack


class Mlp(nn.Module):
    """Linear, exact GELU, Linear.

    Args:
        in_features: C, channels of the input.
        hidden_features: F; None takes in_features.
        out_features: channels of the output; None takes in_features.
        act_layer: nn.GELU.
        drop: dropout, 0.
        bias: whether both layers have a bias.
    Raises:
        ValueError: another activation, or a dropout other than 0.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_no_dropout("mlp", drop=drop)
        if act_layer is not nn.GELU:
            raise ValueError(
                f"mlp: expected act_layer torch.nn.GELU, got {act_layer}; use torch's layers"
            )
        self.fc1 = Linear(in_features, hidden_features or in_features, bias=bias)
        self.fc2 = Linear(hidden_features or in_features, out_features or in_features, bias=bias)

    def forward(self, x: Tensor | Sequence[Tensor], pack: Pack | None = None) -> Any:
        """Map tokens one by one.

        Args:
            x: [..., C], [T, C] with a pack, or a list of [..., C].
            pack: layout of [T, C], which makes no difference.
        Returns:
            [..., out_features], a list for a list.
        """
        if pack is not None or not isinstance(x, Tensor):
            return run_token_by_token(self.forward, x, pack, name="mlp")
        hidden = self.fc1(x)
        activation = gelu(hidden.view(-1, hidden.shape[-1]))  # [R, F]
        return self.fc2(activation.view(hidden.shape))
