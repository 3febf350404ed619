"""The error for weights that do not fit, with every key that does not."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from dinov2_fast.errors import CheckpointError

MAX_LISTED = 12


def mismatch(
    subject: str,
    *,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    misshaped: Iterable[str] = (),
    ways_out: Iterable[str] = (),
) -> CheckpointError:
    """The error that lists every way in which weights do not fit."""
    lines = [subject]
    for title, found in (
        ("missing", list(missing)),
        ("unexpected", list(unexpected)),
        ("mis-shaped", list(misshaped)),
    ):
        if found:
            lines.append(f"  {title} ({len(found)}): {listed(found)}")
    lines += [f"  way out: {way_out}" for way_out in ways_out]
    return CheckpointError("\n".join(lines))


def listed(names: Collection[str]) -> str:
    """Names for a message, the first dozen and how many more."""
    shown = list(names)[:MAX_LISTED]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
