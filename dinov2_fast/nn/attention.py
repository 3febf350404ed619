"""Multi-head self-attention within each sequence of a pack."""

from __future__ import annotations

from torch import Tensor, nn

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
    Raises:
        ValueError: C is not a multiple of H.
    """

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool = True, proj_bias: bool = True
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"attention: expected dim to be a multiple of num_heads, got dim {dim} and "
                f"num_heads {num_heads}"
            )
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, pack: Pack | None = None) -> Tensor:
        """Attend within each sequence.

        Args:
            x: [T, C] tokens of a pack, or [B, N, C] without one.
            pack: layout of x.
        Returns:
            The shape of x.
        """
        tokens, pack = as_packed(x, pack, name="attention")
        q, k, v = self._project(tokens)
        out = attention(q, k, v, pack, scale=self.head_dim**-0.5)  # [T, H, D]
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


class MemEffAttention(Attention):
    """`Attention` with the constructor arguments of DINOv2's class of this name.

    Args:
        dim: C, channels.
        num_heads: H; must divide C.
        qkv_bias: whether the packed projection has a bias.
        proj_bias: whether the output projection has one.
        attn_drop: dropout of attention weights, 0.
        proj_drop: dropout of the output, 0.
    Raises:
        ValueError: see `Attention`; or a dropout other than 0, with which nobody trains DINOv2.
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
        for name, ratio in (("attn_drop", attn_drop), ("proj_drop", proj_drop)):
            if ratio != 0:
                raise ValueError(
                    f"MemEffAttention: expected {name} 0, got {ratio}; "
                    "use drop_path of NestedTensorBlock to regularise"
                )
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias)


def as_packed(x: Tensor, pack: Pack | None, *, name: str) -> tuple[Tensor, Pack]:
    """Packed tokens from either form a layer takes.

    Args:
        x: [T, C] with a pack or [B, N, C] without.
        pack: layout of x, or None.
        name: layer for the error message.
    Returns:
        The tokens [T, C] and their pack.
    Raises:
        ValueError: neither form, or a pack of another number of tokens.
    """
    if pack is None and x.ndim == 3:
        return x.flatten(0, 1), Pack.from_groups([(x.shape[0], x.shape[1])], x.device)
    if pack is None or x.ndim != 2:
        raise ValueError(
            f"{name}: expected x [T, C] with a pack or [B, N, C] without one, "
            f"got {tuple(x.shape)} {'without' if pack is None else 'with'} a pack"
        )
    if pack.num_tokens != x.shape[0]:
        raise ValueError(
            f"{name}: expected x with the {pack.num_tokens} tokens of its pack, "
            f"got {tuple(x.shape)}"
        )
    return x, pack
