"""The message for weights that do not fit."""

from __future__ import annotations

from dinov2_fast.errors import CheckpointError
from dinov2_fast.models.mismatch import listed, mismatch


def test_lists_every_kind_with_its_number_and_the_ways_out():
    error = mismatch(
        "weights: no fit",
        missing=["a", "b"],
        misshaped=["c expected (1,), got (2,)"],
        ways_out=["x"],
    )

    assert isinstance(error, CheckpointError)
    assert str(error).splitlines() == [
        "weights: no fit",
        "  missing (2): a, b",
        "  mis-shaped (1): c expected (1,), got (2,)",
        "  way out: x",
    ]


def test_long_lists_are_cut_with_their_number():
    names = [f"k{i}" for i in range(15)]

    assert listed(names) == "k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11 and 3 more"
    assert listed(names[:12]).endswith("k11")
    assert listed([]) == ""
