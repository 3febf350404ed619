"""The CUDA kernels of csrc/cuda/koleo.cu, launched by their host code and executed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dinov2_fast.ops._native_cuda import run_cuda
from tests.cuda import native_on_ptx
from tests.cuda.koleo_calls import (
    EPS,
    LARGE,
    SMALL,
    among_nan,
    assert_matches_reference,
    same,
)
from tests.cuda.koleo_calls import native as execute
from tests.inputs import randn
from tools.simt import Fault

PRIME = 67  # four tiles of the small one and three rows
SHAPES = [
    (SMALL, 384),  # ViT-S's width
    (SMALL, 77),  # no whole vectors, one channel at a time; past the 64 that are held at once
    (LARGE, 36),  # a vector past the 32 channels that are held at once
    (2, 3),  # the fewest images
    pytest.param((LARGE, 33), marks=pytest.mark.slow),
    pytest.param((PRIME, 768), marks=pytest.mark.slow),  # ViT-B's width
    pytest.param((64, 1024), marks=pytest.mark.slow),  # ViT-L's batch per GPU
    pytest.param((SMALL, 1536), marks=pytest.mark.slow),  # ViT-g's width
]

pytestmark = pytest.mark.skipif(bool(native_on_ptx.why_not()), reason=native_on_ptx.why_not())


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_match_the_reference(shape: tuple[int, int], arch: int):
    x = randn(*shape)
    out, results = execute(among_nan(x), arch=arch)
    assert len(results) == 4
    assert_matches_reference(x, out)


@pytest.mark.parametrize(
    ("rows", "channels"),
    [
        (SMALL, 80),
        *(pytest.param(*shape, marks=pytest.mark.slow) for shape in [(SMALL, 77), (PRIME, 768)]),
    ],
)
def test_no_order_of_warps_and_no_number_of_splits_changes_a_bit(rows: int, channels: int):
    x = randn(rows, channels)
    expected, _ = execute(x)
    for options in ({"num_splits": 1, "schedule": 1}, {"num_splits": 16}):
        found, _ = execute(x, **options)
        assert same(found, expected), options


@pytest.mark.slow
def test_the_tile_of_a_batch_changes_no_nearest_row():
    # Rows that are added point away from all others: nearest to nobody but their like.
    x = randn(SMALL, 8)
    few, _ = execute(torch.nn.functional.pad(x, (0, 1)))
    more = torch.zeros(LARGE - SMALL, 9)
    more[:, 8] = 1.0
    many, _ = execute(torch.cat([torch.nn.functional.pad(x, (0, 1)), more]))
    near = many["nearest"][:SMALL]
    assert torch.equal(near, few["nearest"])
    assert torch.equal(many["losses"][:SMALL], few["losses"])


def test_warps_touch_whole_sectors_and_no_banks_conflict():
    rows = 16
    _, results = execute(randn(rows, 512), profile=True)
    for result in results:
        for kind in ("load", "store"):
            sectors = result.counters[f"global sectors, {kind}"]
            wasted = sectors * 32 - result.counters[f"global bytes, {kind}"]
            # Numbers of a row, and of the rows that pull at it, take sectors of their own.
            assert wasted <= 32 * 24 * rows
        for kind in ("load", "store", "copy"):
            passes = result.counters.get(f"shared passes, {kind}", 0)
            assert passes == result.counters.get(f"shared passes, {kind}, ideal", 0)


@pytest.mark.parametrize(
    "shape", [(SMALL, 132), pytest.param((LARGE, 36), marks=pytest.mark.slow)], ids=str
)
def test_every_deleted_barrier_and_wait_is_reported(shape: tuple[int, int]):
    x = randn(*shape)
    _, results = execute(x)
    deletions = list(native_on_ptx.deletions(results))
    assert len(deletions) >= 5  # two barriers, a commit and a wait of the search; of the gradient
    for edit in deletions:
        with pytest.raises(Fault):
            execute(x, edit=edit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 1}, "rows must be at least 2, got 1"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"num_splits": 0}, "num_splits must be at least 1, got 0"),
        ({"bests": None}, "bests must not be a null pointer"),
        ({"x_row_stride": -1}, "x: expected a row stride of at least 0"),
    ],
)
def test_the_binding_rejects_what_it_cannot_compute(changes: dict[str, Any], message: str):
    x, vector, numbers = torch.ones(2, 4), torch.empty(2), torch.empty(2, dtype=torch.int64)
    good = {"x": x, "losses": vector, "normalised": x.clone(), "norms": vector, "pulls": vector}
    good |= {"nearest": numbers, "bests": numbers, "rows": 2, "channels": 4, "num_splits": 1}
    good |= {"x_row_stride": 4, "eps": EPS}
    with native_on_ptx.native_on_ptx(), pytest.raises(ValueError, match=message):
        run_cuda("koleo_forward_cuda", **(good | changes))
