"""The forms in which layers take tokens: one tensor, a pack, or a list of tensors run as one pack.

A layer asks `isinstance(x, Tensor)` itself, which costs a tensor no call of Python, and comes here
with anything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dinov2_fast.packing import Pack, pack_tokens, unpack_tokens


def as_packed(x: Tensor, pack: Pack | None, *, name: str) -> tuple[Tensor, Pack]:
    """Packed tokens from a batch or a pack.

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


def run_as_one_pack(
    forward: Callable[..., Any], batches: Any, pack: Pack | None, *, name: str, **options: Any
) -> list[Tensor]:
    """A layer's outputs for a list of batches, from one call on the pack of their tokens.

    Args:
        forward: maps tokens [T, C] in a buffer of their own and their pack to [T, ...], or to a
            list with an element for each group.
        batches: list or tuple of [B_i, N_i, C].
        pack: what the caller gave beside them: None.
        name: layer for error messages.
        **options: keyword arguments of `forward`.
    Returns:
        [B_i, N_i, ...] for each batch, as views of one tensor.
    Raises:
        TypeError: no list, or a list of something else than tensors.
        ValueError: an empty list, batches that do not fit each other, or a pack.
    """
    check_list(batches, pack, name=name)
    tokens, layout = pack_tokens(batches, name=name)
    out = forward(tokens, layout, **options)
    return unpack_tokens(out, layout) if isinstance(out, Tensor) else out


def run_token_by_token(
    forward: Callable[[Tensor], Tensor], x: Any, pack: Pack | None, *, name: str
) -> Any:
    """Outputs of a layer that looks at no token's neighbours, for a pack or a list.

    Args:
        forward: maps [T, C] to [T, ...].
        x: [T, C] with a pack; or list or tuple of tensors [..., C].
        pack: layout of x, or None.
        name: layer for error messages.
    Returns:
        [T, ...]; or a list of [..., ...], as views of the output of one call.
    Raises:
        TypeError: neither a tensor nor a list of tensors.
        ValueError: an empty list, tensors that do not fit each other or the pack.
    """
    if isinstance(x, Tensor):
        return forward(as_packed(x, pack, name=name)[0])
    check_list(x, pack, name=name)
    if any(part.ndim == 0 for part in x):
        raise ValueError(
            f"{name}: expected tensors [..., C] in the list, got one without dimensions"
        )
    rows = [part.reshape(1, math.prod(part.shape[:-1]), part.shape[-1]) for part in x]
    tokens, layout = pack_tokens(rows, name=name)
    out = forward(tokens)
    parts = zip(x, unpack_tokens(out, layout), strict=True)
    return [part.view(*given.shape[:-1], *out.shape[1:]) for given, part in parts]


def check_list(batches: Any, pack: Pack | None, *, name: str) -> None:
    """Refuse what is no list of tensors.

    Args:
        batches: what a layer was given instead of a tensor.
        pack: what it was given beside it.
        name: layer for error messages.
    Raises:
        TypeError: no list, or a list of something else than tensors.
        ValueError: an empty list, or a pack, which only [T, C] tokens have.
    """
    if not isinstance(batches, (list, tuple)):
        way_out = "; give its tokens [T, C] in front of it" if isinstance(batches, Pack) else ""
        raise TypeError(
            f"{name}: expected x to be a tensor or a list of tensors, got a "
            f"{type(batches).__name__}{way_out}"
        )
    if not batches:
        raise ValueError(
            f"{name}: expected at least one tensor in the list, got none; skip the call"
        )
    if pack is not None:
        raise ValueError(
            f"{name}: expected a pack beside a tensor [T, C], got one beside a list of "
            f"{len(batches)}; leave it out, each tensor of a list becomes a group of a pack"
        )
    for position, batch in enumerate(batches):
        if not isinstance(batch, Tensor):
            raise TypeError(
                f"{name}: expected a list of tensors, got a {type(batch).__name__} at position "
                f"{position}; a list within a list has to be spread out"
            )
