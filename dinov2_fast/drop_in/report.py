"""What `accelerate` did to a model, in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One half of one block.

    Args:
        block: name of the block in the model.
        half: `attention` or `feed-forward`.
        reason: why it runs as its library wrote it, or not on the leanest path; "" for the latter.
    """

    block: str
    half: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What `accelerate` did; as text, what a person wants to read.

    Args:
        library: whose blocks the model has.
        replaced: halves that own their memory.
        skipping: halves that run with their library's modules on the samples drop path keeps, since
            there is no measured kernel for their device or type.
        left: halves that run as their library wrote them.
        notes: what else is different now.
    """

    library: str
    replaced: tuple[Entry, ...]
    skipping: tuple[Entry, ...]
    left: tuple[Entry, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Several lines."""
        lines = [f"accelerate: blocks of {self.library}"]
        for title, entries in (
            ("replaced", self.replaced),
            ("skipping dropped samples only", self.skipping),
            ("left", self.left),
        ):
            lines += [f"  {title}: {line}" for line in _grouped(entries)]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _grouped(entries: Iterable[Entry]) -> list[str]:
    """One line for all blocks of which the same is true."""
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        groups.setdefault((entry.half, entry.reason), []).append(entry.block)
    return [
        f"{half} of {_names(blocks)}{f': {reason}' if reason else ''}"
        for (half, reason), blocks in groups.items()
    ]


def _names(blocks: list[str]) -> str:
    """A list that stays short."""
    if len(blocks) <= 2:
        return " and ".join(blocks)
    return f"{len(blocks)} blocks, {blocks[0]} to {blocks[-1]}"
