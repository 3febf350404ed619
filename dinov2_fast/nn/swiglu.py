"""The gated feed-forward layer of ViT-g."""

from __future__ import annotations

from torch import Tensor, nn

from dinov2_fast.nn.linear import Linear
from dinov2_fast.ops.swiglu import swiglu

HIDDEN_MULTIPLE = 8


def swiglu_hidden_features(mlp_hidden_features: int) -> int:
    """F of a SwiGLU layer that costs as much as an MLP.

    Args:
        mlp_hidden_features: hidden width the MLP would have, 4 C in every DINOv2 model.
    Returns:
        Two thirds of it, rounded up to a multiple of 8: the gate is a third matrix.
    """
    two_thirds = int(mlp_hidden_features * 2 / 3)
    return -(-two_thirds // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE


class SwiGLUFFN(nn.Module):
    """`w3(silu(gate) * value)` with gate and value, in this order, from one packed layer `w12`.

    Args:
        in_features: C, channels of the input.
        hidden_features: width of the MLP this layer replaces, reduced by
            `swiglu_hidden_features`; None takes in_features.
        out_features: channels of the output; None takes in_features.
        bias: whether both layers have a bias.
    Source: "GLU Variants Improve Transformer", arXiv 2002.05202.
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
        self.hidden_features = swiglu_hidden_features(hidden_features or in_features)
        self.w12 = Linear(in_features, 2 * self.hidden_features, bias=bias)
        self.w3 = Linear(self.hidden_features, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., C] token by token."""
        x12 = self.w12(x)
        hidden = swiglu(x12.view(-1, x12.shape[-1]))  # [R, 2F] -> [R, F]
        return self.w3(hidden.view(*x.shape[:-1], self.hidden_features))


SwiGLUFFNFused = SwiGLUFFN  # the name under which DINOv2's configurations ask for it
