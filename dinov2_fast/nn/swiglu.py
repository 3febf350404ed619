"""The gated feed-forward layer of ViT-g."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dinov2_fast.nn.dropout import check_no_dropout
from dinov2_fast.nn.input_forms import run_token_by_token
from dinov2_fast.nn.linear import Linear
from dinov2_fast.ops.swiglu import swiglu
from dinov2_fast.packing import Pack

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
        hidden_features: F; None takes in_features.
        out_features: channels of the output; None takes in_features.
        act_layer: has no effect, as in DINOv2: the activation is SiLU.
        drop: dropout, 0.
        bias: whether both layers have a bias.
    Raises:
        ValueError: a dropout other than 0.
    Source: "GLU Variants Improve Transformer", arXiv 2002.05202.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_no_dropout("swiglu", drop=drop)
        self.hidden_features = hidden_features or in_features
        self.w12 = Linear(in_features, 2 * self.hidden_features, bias=bias)
        self.w3 = Linear(self.hidden_features, out_features or in_features, bias=bias)

    def forward(self, x: Tensor | Sequence[Tensor], pack: Pack | None = None) -> Any:
        """Map tokens one by one.

        Args:
            x: [..., C], [T, C] with a pack, or a list of [..., C].
            pack: layout of [T, C], which makes no difference.
        Returns:
            [..., out_features], a list for a list.
        """
        if pack is not None or not isinstance(x, Tensor):
            return run_token_by_token(self.forward, x, pack, name="swiglu")
        x12 = self.w12(x)
        hidden = swiglu(x12.view(-1, x12.shape[-1]))  # [R, 2F] -> [R, F]
        return self.w3(hidden.view(*x.shape[:-1], self.hidden_features))


class SwiGLUFFNFused(SwiGLUFFN):
    """`SwiGLUFFN` that costs as much as an MLP: the feed-forward layer of DINOv2's ViT-g.

    Args:
        in_features: C, channels of the input.
        hidden_features: width of the MLP this layer replaces, reduced by
            `swiglu_hidden_features`; None takes in_features.
        out_features: see `SwiGLUFFN`.
        act_layer: see `SwiGLUFFN`.
        drop: see `SwiGLUFFN`.
        bias: see `SwiGLUFFN`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        reduced = swiglu_hidden_features(hidden_features or in_features)
        super().__init__(in_features, reduced, out_features, act_layer, drop, bias)
