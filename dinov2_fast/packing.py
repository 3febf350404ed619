"""Sequences of different lengths as one [T, C] tensor, and where each of them lies.

A batch of crops has only a few lengths, each repeated many times, so a `Pack` is a handful of runs
`(num_sequences, length)` known on the host. Nothing that uses one waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise
from typing import cast

import torch
from torch import Tensor

MAX_TOKENS = 2**31 - 1  # offsets are int32


@dataclass(frozen=True)
class Pack:
    """Layout of a packed tensor; build one with a `from_` constructor.

    Args:
        groups: runs `(num_sequences, length)` in packing order; a run may be empty.
        offsets: [S + 1] int32, first row of each sequence and T at the end, on the device of the
            tokens.
    """

    groups: tuple[tuple[int, int], ...]
    offsets: Tensor = field(compare=False, repr=False)

    @classmethod
    def from_groups(
        cls, groups: Sequence[tuple[int, int]], device: torch.device | str | None = None
    ) -> Pack:
        """A pack of runs of equally long sequences.

        Args:
            groups: `(num_sequences, length)` of each run; neighbours of equal length stay apart.
            device: where `offsets` lives; None is torch's default device.
        Returns:
            The pack.
        Raises:
            ValueError: a negative number, or more than 2^31 - 1 tokens.
        """
        runs = tuple((int(count), int(length)) for count, length in groups)
        for count, length in runs:
            if count < 0 or length < 0:
                raise ValueError(
                    f"pack: expected groups of non-negative numbers, got ({count}, {length})"
                )
        num_tokens = sum(count * length for count, length in runs)
        if num_tokens > MAX_TOKENS:
            raise ValueError(
                f"pack: expected at most {MAX_TOKENS} tokens (int32 offsets), got {num_tokens}; "
                "split the batch"
            )
        offsets = torch.tensor(_offsets(runs), dtype=torch.int32, device=device)
        return cls(groups=runs, offsets=offsets)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str | None = None) -> Pack:
        """A pack of single sequences; neighbours of equal length become one run.

        Args:
            lengths: tokens of each sequence, zero allowed.
            device: where `offsets` lives; None is torch's default device.
        Returns:
            The pack.
        Raises:
            ValueError: a negative length, or more than 2^31 - 1 tokens.
        """
        runs = [(len(list(run)), length) for length, run in groupby(int(n) for n in lengths)]
        return cls.from_groups(runs, device)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, max_seqlen: int) -> Pack:
        """A pack from cumulative lengths; waits for the device, because a pack is host knowledge.

        Args:
            cu_seqlens: [S + 1] int32, cumulative lengths that start at 0.
            max_seqlen: upper bound on the length of a sequence, in tokens.
        Returns:
            The pack, on the device of `cu_seqlens`.
        Raises:
            ValueError: see `check_cu_seqlens`.
        """
        offsets = check_cu_seqlens(cu_seqlens, max_seqlen)
        lengths = [end - begin for begin, end in pairwise(offsets)]
        return cls.from_lengths(lengths, cu_seqlens.device)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each of the S sequences."""
        return tuple(length for count, length in self.groups for _ in range(count))

    @property
    def offsets_host(self) -> tuple[int, ...]:
        """First row of each sequence and T at the end: S + 1 numbers."""
        return tuple(_offsets(self.groups))

    @property
    def group_tokens(self) -> tuple[int, ...]:
        """Tokens of each run; they sum to T."""
        return tuple(count * length for count, length in self.groups)

    @property
    def num_sequences(self) -> int:
        """S, the number of sequences."""
        total = 0
        for count, _ in self.groups:  # a loop, as generators cost what every call asks
            total += count
        return total

    @property
    def num_tokens(self) -> int:
        """T, the tokens of all sequences."""
        total = 0
        for count, length in self.groups:
            total += count * length
        return total

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence; 0 if there is none."""
        return max((length for count, length in self.groups if count), default=0)

    @property
    def device(self) -> torch.device:
        """Where `offsets` lives."""
        return self.offsets.device

    def to(self, device: torch.device | str) -> Pack:
        """The same layout with `offsets` on another device."""
        return Pack(groups=self.groups, offsets=self.offsets.to(device))


def pack_tokens(tensors: Sequence[Tensor], *, name: str = "pack_tokens") -> tuple[Tensor, Pack]:
    """Concatenate batches of sequences into one tensor; each batch becomes one group of the pack.

    Args:
        tensors: batches [S_i, N_i, C] with the same C, dtype and device.
        name: who asks, for error messages.
    Returns:
        The tokens [T, C] and their pack.
    Raises:
        ValueError: no batch, a wrong shape, or batches that differ in C, dtype or device.
    """
    if not tensors:
        raise ValueError(f"{name}: expected at least one batch [S, N, C], got none")
    first = tensors[0]
    for tensor in tensors:
        if tensor.ndim != 3:
            raise ValueError(f"{name}: expected [S, N, C], got {tuple(tensor.shape)}")
        if tensor.shape[2] != first.shape[2]:
            raise ValueError(
                f"{name}: expected {first.shape[2]} channels in every batch, "
                f"got {tensor.shape[2]}; call it for each width"
            )
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"{name}: expected {first.dtype} on {first.device} in every batch, "
                f"got {tensor.dtype} on {tensor.device}; convert with .to()"
            )
    pack = Pack.from_groups([(t.shape[0], t.shape[1]) for t in tensors], first.device)
    return torch.cat([t.flatten(0, 1) for t in tensors]), pack  # [T, C]


def unpack_tokens(x: Tensor, pack: Pack) -> list[Tensor]:
    """The batches of a packed tensor, one per group, as views.

    Args:
        x: [T, ...] tokens; further dimensions are kept.
        pack: their layout.
    Returns:
        Views [S_i, N_i, ...] in packing order.
    Raises:
        ValueError: x does not have the pack's number of tokens.
    """
    if x.ndim < 1 or x.shape[0] != pack.num_tokens:
        raise ValueError(
            f"unpack_tokens: expected x with {pack.num_tokens} tokens, got {tuple(x.shape)}"
        )
    if not pack.groups:
        return []
    # One split, not one slice per group: its backward is a single concatenation.
    parts = torch.split(x, list(pack.group_tokens))
    return [part.unflatten(0, group) for part, group in zip(parts, pack.groups, strict=True)]


def check_cu_seqlens(
    cu_seqlens: Tensor, max_seqlen: int, total: int | None = None
) -> tuple[int, ...]:
    """Check cumulative sequence lengths before anything is read through them.

    Args:
        cu_seqlens: [S + 1] int32: starts at 0, never decreases; equal neighbours are an empty
            sequence and `[0]` is a pack without sequences.
        max_seqlen: upper bound on the length of a sequence, in tokens; may be too large.
        total: T of the tensor it describes; None skips that check.
    Returns:
        The offsets on the host (waits for the device).
    Raises:
        ValueError: any of the above does not hold.
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens: expected shape (S + 1,), got {tuple(cu_seqlens.shape)}; "
            "a pack without sequences is [0]"
        )
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens: expected dtype torch.int32, got {cu_seqlens.dtype}; "
            "use cu_seqlens.to(torch.int32)"
        )
    offsets = tuple(cast("list[int]", cu_seqlens.tolist()))  # pyright: ignore[reportUnknownMemberType]
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens: expected to start at 0, got {offsets[0]}")
    longest = 0
    for sequence, (begin, end) in enumerate(pairwise(offsets)):
        if end < begin:
            raise ValueError(
                f"cu_seqlens: expected non-decreasing offsets, got {begin} then {end} "
                f"at sequence {sequence}"
            )
        longest = max(longest, end - begin)
    if total is not None and offsets[-1] != total:
        raise ValueError(
            f"cu_seqlens: expected to end at the number of tokens {total}, got {offsets[-1]}"
        )
    if max_seqlen < longest:
        raise ValueError(
            f"max_seqlen: expected at least {longest}, the longest sequence, got {max_seqlen}"
        )
    return offsets


def _offsets(groups: Sequence[tuple[int, int]]) -> list[int]:
    """First row of each sequence and the total at the end."""
    lengths = [length for count, length in groups for _ in range(count)]
    return list(accumulate(lengths, initial=0))
