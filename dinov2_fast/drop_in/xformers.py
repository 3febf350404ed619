"""Attention under the names of xFormers that DINOv2 uses, for an exchange of imports.

Every name that DINOv2's attention and block import from `xformers.ops` stands here, so that theirs
may be `from dinov2_fast.drop_in.xformers import fmha, index_select_cat, scaled_index_add`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from dinov2_fast.ops.attention import attention
from dinov2_fast.packing import Pack, unpack_tokens

fmha = sys.modules[__name__]  # the module of masks: `fmha.BlockDiagonalMask`
unbind = torch.unbind  # views, as theirs gives


class BlockDiagonalMask:
    """Sequences laid end to end, none of which sees another.

    Args:
        seqlens: tokens of each sequence.
    Raises:
        ValueError: see `Pack.from_lengths`.
    """

    def __init__(self, seqlens: Sequence[int]) -> None:
        self.pack = Pack.from_lengths(seqlens, "cpu")
        self._batch_sizes: Sequence[int] | None = None  # DINOv2's code sets it by this name

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> BlockDiagonalMask:
        """A mask from lengths.

        Args:
            q_seqlen: tokens of each sequence.
            kv_seqlen: None, or the same.
            device: any; a mask follows the queries it is used with.
        Raises:
            ValueError: keys of other lengths than the queries.
        """
        if kv_seqlen is not None and list(kv_seqlen) != list(q_seqlen):
            raise ValueError(
                "BlockDiagonalMask: expected kv_seqlen None or equal to q_seqlen (self-attention), "
                f"got {list(kv_seqlen)}; use xFormers for cross-attention"
            )
        return cls(q_seqlen)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        """A mask for batches, and the batches laid end to end.

        Args:
            tensors: [B_i, N_i, ...] each.
        Returns:
            The mask and [1, T, ...].
        """
        mask = cls([x.shape[1] for x in tensors for _ in range(x.shape[0])])
        mask._batch_sizes = [x.shape[0] for x in tensors]
        return mask, torch.cat([x.flatten(0, 1) for x in tensors]).unsqueeze(0)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The batches of a tensor that `from_tensor_list` made, or its single sequences.

        Args:
            tensor: [1, T, ...].
        Returns:
            [B_i, N_i, ...] each.
        Raises:
            ValueError: another number of tokens, or batches of unequal sequences.
        """
        if tensor.ndim < 2 or tensor.shape[0] != 1:
            raise ValueError(f"split: expected tensor [1, T, ...], got {tuple(tensor.shape)}")
        lengths = self.pack.lengths
        sizes = [1] * len(lengths) if self._batch_sizes is None else self._batch_sizes
        groups, begin = [], 0
        for size in sizes:
            batch = lengths[begin : begin + size]
            if len(batch) < size or len(set(batch)) > 1:
                raise ValueError(
                    f"split: expected batches of {list(sizes)} equally long sequences, "
                    f"got lengths {list(lengths)}"
                )
            groups.append((size, batch[0] if batch else 0))
            begin += size
        return unpack_tokens(tensor[0], Pack.from_groups(groups, "cpu"))


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: BlockDiagonalMask | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: object = None,
) -> Tensor:
    """Attention of batches, or within the sequences of a mask.

    Args:
        query: [B, N, H, D]; [1, T, H, D] with a mask.
        key: the same shape.
        value: the same shape.
        attn_bias: None, or which tokens belong together.
        p: dropout, 0.
        scale: factor on the scores; None is D^-0.5.
        op: None; which kernel runs is `dinov2_fast.use_backend`'s business.
    Returns:
        The shape of query.
    Raises:
        TypeError: another bias.
        ValueError: shapes that do not fit, dropout, or an op.
    """
    name = "memory_efficient_attention"
    if p != 0:
        raise ValueError(f"{name}: expected p 0, got {p}; DINOv2 trains without attention dropout")
    if op is not None:
        raise ValueError(f"{name}: expected op None, got {op}; use dinov2_fast.use_backend")
    if attn_bias is not None and not isinstance(attn_bias, BlockDiagonalMask):
        raise TypeError(
            f"{name}: expected attn_bias None or dinov2_fast's BlockDiagonalMask, got "
            f"{type(attn_bias).__name__}; use torch.nn.functional.scaled_dot_product_attention"
        )
    if query.ndim != 4 or key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            f"{name}: expected query, key and value of one shape [B, N, H, D], got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}; "
            "unsqueeze(2) a single head, repeat shared ones"
        )
    if attn_bias is None:
        pack = Pack.from_groups([(query.shape[0], query.shape[1])], query.device)
    elif query.shape[0] != 1:
        raise ValueError(
            f"{name}: expected query [1, T, H, D] with a mask, got {tuple(query.shape)}; "
            "lay sequences end to end with BlockDiagonalMask.from_tensor_list"
        )
    elif attn_bias.pack.num_tokens != query.shape[1]:
        raise ValueError(
            f"{name}: expected attn_bias of the {query.shape[1]} tokens of query, got one of "
            f"{attn_bias.pack.num_tokens}"
        )
    else:
        pack = attn_bias.pack.to(query.device)
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))  # [T, H, D]
    return attention(q, k, v, pack, scale=scale).view(query.shape)


def index_select_cat(sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Chosen rows of several matrices, end to end.

    Args:
        sources: [R_i, C_i] each.
        indices: [M_i] rows of each.
    Returns:
        All their numbers in one dimension: [sum of M_i * C_i].
    Raises:
        ValueError: another number of indices than of sources.
    """
    if len(sources) != len(indices):
        raise ValueError(
            f"index_select_cat: expected indices for each of {len(sources)} sources, "
            f"got {len(indices)}"
        )
    chosen = zip(sources, indices, strict=True)
    return torch.cat([source.index_select(0, rows).flatten() for source, rows in chosen])


def scaled_index_add(
    input: Tensor,
    index: Tensor,
    source: Tensor,
    scaling: Tensor | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """Add scaled samples to chosen ones of a batch, in place.

    Args:
        input: [B, N, C], changed.
        index: [M] samples, none twice.
        source: [M, N, C] what is added to them.
        scaling: [C] factors of LayerScale; None is 1.
        alpha: factor on everything.
    Returns:
        The input.
    """
    scaled = source if scaling is None else source * scaling.to(source.dtype)
    return input.index_add_(0, index, scaled, alpha=alpha)
