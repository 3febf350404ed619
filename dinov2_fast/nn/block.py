"""A pre-norm transformer block on packed tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dinov2_fast.nn.attention import Attention, as_packed
from dinov2_fast.nn.layer_norm import LayerNorm
from dinov2_fast.nn.layer_scale import LayerScale
from dinov2_fast.nn.mlp import Mlp
from dinov2_fast.nn.stochastic_depth import add_branch
from dinov2_fast.nn.swiglu import SwiGLUFFN
from dinov2_fast.packing import Pack

FFN_LAYERS: dict[str, type[Mlp] | type[SwiGLUFFN]] = {"mlp": Mlp, "swiglu": SwiGLUFFN}


class Block(nn.Module):
    """Attention and feed-forward, each with norm, LayerScale and stochastic depth of its own.

    Args:
        dim: C, channels.
        num_heads: H; must divide C.
        mlp_ratio: hidden width of the MLP over C; SwiGLU takes two thirds of it.
        ffn: feed-forward layer, `mlp` or `swiglu`.
        drop_ratio: share of the samples that each branch skips in training, in [0, 1).
        layer_scale: initial value of the LayerScale vectors; None leaves them out.
        qkv_bias: whether queries, keys and values have a bias.
        eps: of both norms.
    Raises:
        ValueError: unknown ffn, or a drop_ratio outside [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        ffn: Literal["mlp", "swiglu"] = "mlp",
        drop_ratio: float = 0.0,
        layer_scale: float | None = 1e-5,
        qkv_bias: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if ffn not in FFN_LAYERS:
            raise ValueError(f"block: expected ffn to be one of {', '.join(FFN_LAYERS)}, got {ffn}")
        if not 0 <= drop_ratio < 1:
            raise ValueError(f"block: expected drop_ratio in [0, 1), got {drop_ratio}")
        self.drop_ratio = drop_ratio
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias)
        self.ls1 = _layer_scale(dim, layer_scale)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = FFN_LAYERS[ffn](dim, int(dim * mlp_ratio))
        self.ls2 = _layer_scale(dim, layer_scale)

    def forward(
        self, x: Tensor, pack: Pack | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Run both branches; in training each draws the samples it keeps, per group of the pack.

        Args:
            x: [T, C] tokens of a pack, or [B, N, C] without one.
            pack: layout of x.
            generator: CPU generator of the draws; None draws from torch's global one.
        Returns:
            The shape of x.
        """
        tokens, pack = as_packed(x, pack, name="block")
        drop_ratio = self.drop_ratio if self.training else 0.0
        tokens = add_branch(
            tokens,
            pack,
            self.norm1,
            self.attn,
            _gamma(self.ls1),
            drop_ratio=drop_ratio,
            generator=generator,
        )
        tokens = add_branch(
            tokens,
            pack,
            self.norm2,
            self._feed_forward,
            _gamma(self.ls2),
            drop_ratio=drop_ratio,
            generator=generator,
        )
        return tokens.view(x.shape)

    def _feed_forward(self, x: Tensor, _pack: Pack) -> Tensor:
        return self.mlp(x)


def _layer_scale(dim: int, init_value: float | None) -> nn.Module:
    return nn.Identity() if init_value is None else LayerScale(dim, init_value=init_value)


def _gamma(layer_scale: nn.Module) -> Tensor | None:
    return layer_scale.gamma if isinstance(layer_scale, LayerScale) else None
