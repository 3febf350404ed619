"""Multi-head self-attention within each sequence of a pack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dinov2_fast.nn.dropout import check_no_dropout
from dinov2_fast.nn.input_forms import as_packed, run_as_one_pack
from dinov2_fast.nn.linear import Linear
from dinov2_fast.ops.attention import attention, attention_weights
from dinov2_fast.packing import Pack


class Attention(nn.Module):
    """Self-attention with one packed projection for queries, keys and values.

    Args:
        dim: C, channels.
        num_heads: H; must divide C.
        qkv_bias: whether the packed projection has a bias.
        proj_bias: whether the output projection has one.
        attn_drop: dropout of attention weights, 0.
        proj_drop: dropout of the output, 0.
    Raises:
        ValueError: C is not a multiple of H, or a dropout other than 0.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_no_dropout("attention", attn_drop=attn_drop, proj_drop=proj_drop)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"attention: expected dim to be a multiple of num_heads, got dim {dim} and "
                f"num_heads {num_heads}"
            )
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim, bias=proj_bias)

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        pack: Pack | None = None,
        *,
        return_attention: bool = False,
    ) -> Any:
        """Attend within each sequence.

        Args:
            x: [B, N, C], [T, C] tokens of a pack, or a list of [B_i, N_i, C].
            pack: layout of [T, C].
            return_attention: give the attention probabilities instead.
        Returns:
            The shape of x, a list for a list; or `weights`, for [B, N, C] its only element.
        """
        if not isinstance(x, Tensor):
            return run_as_one_pack(
                self.forward, x, pack, name="attention", return_attention=return_attention
            )
        tokens, layout = as_packed(x, pack, name="attention")
        if return_attention:
            weights = self.weights(tokens, layout)
            return weights[0] if pack is None else weights
        q, k, v = self._project(tokens)
        out = attention(q, k, v, layout, scale=self.head_dim**-0.5)  # [T, H, D]
        return self.proj(out.flatten(1)).view(x.shape)

    def weights(self, x: Tensor, pack: Pack) -> list[Tensor]:
        """The attention probabilities, which `forward` never stores.

        Args:
            x: [T, C] tokens.
            pack: layout of x.
        Returns:
            [S_i, H, N_i, N_i] for each group of the pack; rows are queries and sum to 1.
        """
        q, k, _ = self._project(x)
        return attention_weights(q, k, pack, scale=self.head_dim**-0.5)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [T, H, D] as strided views: ops read strides, no copy."""
        q, k, v = self.qkv(x).view(-1, 3, self.num_heads, self.head_dim).unbind(1)
        return q, k, v


MemEffAttention = Attention  # the name under which DINOv2's configurations ask for it
