"""The transformer block under the name, and with the constructor arguments, of DINOv2's code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast.nn.attention import MemEffAttention, as_packed
from dinov2_fast.nn.block import FFN_LAYERS, Block
from dinov2_fast.nn.layer_norm import LayerNorm
from dinov2_fast.nn.mlp import Mlp
from dinov2_fast.nn.swiglu import SwiGLUFFN
from dinov2_fast.packing import Pack, pack_tokens, unpack_tokens


class NestedTensorBlock(Block):
    """`Block` that also takes a list of batches, computed as one pack.

    Args:
        dim: C, channels.
        num_heads: H; must divide C.
        mlp_ratio: hidden width of the MLP over C; SwiGLU takes two thirds of it.
        qkv_bias: whether queries, keys and values have a bias.
        proj_bias: whether attention's output projection has one.
        ffn_bias: whether the feed-forward layers have one.
        drop: dropout, 0.
        attn_drop: dropout of attention weights, 0.
        init_values: initial value of the LayerScale vectors; None or 0 leaves them out.
        drop_path: share of the samples that each branch skips in training, in [0, 1).
        act_layer: nn.GELU.
        norm_layer: makes a LayerNorm of dim; its eps is taken over.
        attn_class: MemEffAttention.
        ffn_layer: Mlp, SwiGLUFFN or SwiGLUFFNFused.
    Raises:
        ValueError: another layer or a dropout, or see `Block`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., Any] = nn.LayerNorm,
        attn_class: type[nn.Module] = MemEffAttention,
        ffn_layer: type[Mlp] | type[SwiGLUFFN] = Mlp,
    ) -> None:
        if drop != 0 or act_layer is not nn.GELU or attn_class is not MemEffAttention:
            raise ValueError(
                "NestedTensorBlock: expected drop 0, act_layer nn.GELU and attn_class "
                f"dinov2_fast.nn.MemEffAttention, got {drop}, {act_layer} and {attn_class}; "
                "use torch's layers in a block of your own, and dinov2_fast.nn.DropPath"
            )
        kinds = {layer: name for name, layer in FFN_LAYERS.items()}
        norm = norm_layer(dim)
        if ffn_layer not in kinds or type(norm) not in (nn.LayerNorm, LayerNorm):
            raise ValueError(
                "NestedTensorBlock: expected ffn_layer Mlp, SwiGLUFFN or SwiGLUFFNFused of "
                f"dinov2_fast.nn and norm_layer nn.LayerNorm, got {ffn_layer} and {norm_layer}"
            )
        super().__init__(
            dim,
            num_heads,
            mlp_ratio=mlp_ratio,
            ffn=kinds[ffn_layer],  # pyright: ignore[reportArgumentType]
            drop_ratio=drop_path,
            layer_scale=init_values or None,
            eps=norm.eps,
        )
        self.attn = MemEffAttention(dim, num_heads, qkv_bias, proj_bias, attn_drop)
        if not ffn_bias:
            self.mlp = FFN_LAYERS[kinds[ffn_layer]](dim, int(dim * mlp_ratio), bias=False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Any,
        pack: Pack | None = None,
        *,
        return_attention: bool = False,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Any:
        """Run both branches on a batch, a pack, or a list of batches.

        Args:
            x: [B, N, C] tokens, [T, C] with a pack, or a sequence of [B_i, N_i, C].
            pack: layout of [T, C].
            return_attention: give the attention probabilities instead, which the block computes
                without storing them.
            generator: CPU generator of stochastic depth; None draws from torch's global one.
            **options: see `Block.forward`.
        Returns:
            The shape of x, a list for a list; or [B, H, N, N] of each batch or group.
        Raises:
            ValueError: x does not fit the pack, or batches do not fit each other.
        """
        if isinstance(x, Tensor):
            if return_attention:
                weights = self._attention_of(*as_packed(x, pack, name="block"))
                return weights[0] if pack is None else weights
            return super().forward(x, pack, generator=generator, **options)
        tokens, pack = pack_tokens(x)
        if return_attention:
            return self._attention_of(tokens, pack)
        return unpack_tokens(super().forward(tokens, pack, generator=generator, **options), pack)

    def _attention_of(self, tokens: Tensor, pack: Pack) -> Sequence[Tensor]:
        return self.attn.weights(self.norm1(tokens), pack)
