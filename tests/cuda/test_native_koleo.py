"""The CUDA kernels of csrc/cuda/koleo.cu, launched by their host code and executed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast.ops._native_cuda import run_cuda
from tests.cuda import native_on_ptx
from tests.cuda.koleo_calls import (
    EPS,
    Outputs,
    among_nan,
    assert_matches_reference,
    reference,
    same,
)
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget
from tools.simt import Fault

# Batch sizes of each tile's kernel, neither of whole tiles; of three splits of the small one the
# last is empty.
SMALL, LARGE = 19, 515
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


def execute(x: Tensor, *, num_splits: int = 3, **options: Any) -> tuple[Outputs, list[Any]]:
    """What the kernels compute of strided rows, forward and backward, and the launches' results."""
    rows, channels = x.shape
    losses, norms, pulls = (torch.full((rows,), torch.nan) for _ in range(3))
    normalised, dx = (torch.full((rows, channels), torch.nan) for _ in range(2))
    nearest = torch.full((rows,), -1)
    bests = torch.full((rows, num_splits), -1)
    kept = {"normalised": normalised, "norms": norms, "nearest": nearest, "pulls": pulls}
    kept |= {"rows": rows, "channels": channels, "eps": EPS}
    sizes: Any = {"num_splits": num_splits, "x_row_stride": x.stride(0)}
    with native_on_ptx.native_on_ptx(**options) as results:
        run_cuda("koleo_forward_cuda", x=x, losses=losses, bests=bests, **kept, **sizes)
        gradients = torch.full((rows,), 1 / rows)
        run_cuda("koleo_backward_cuda", gradients=gradients, dx=dx, **kept)
    return {"losses": losses, "nearest": nearest, "dx": dx, "normalised": normalised}, results


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_match_the_reference(shape: tuple[int, int], arch: int):
    x = randn(*shape)
    out, results = execute(among_nan(x), arch=arch)
    assert len(results) == 4
    assert_matches_reference(x, out)


@pytest.mark.parametrize("rows", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)])
def test_the_lowest_of_equal_rows_is_found(rows: int):
    # Five of each: they are in other lanes, warps, tiles and splits.
    kinds = torch.arange(rows) % (rows // 5)
    kinds = kinds[torch.randperm(rows)]
    x = randn(rows // 5, 40)[kinds]
    out, _ = execute(x)
    equal = kinds[:, None] == kinds[None, :]
    expected = equal.fill_diagonal_(False).int().argmax(dim=1)
    assert torch.equal(out["nearest"], expected)
    assert torch.equal(out["dx"], torch.zeros_like(x))


def test_opposite_rows_prefer_each_other_to_what_fills_a_tile():
    x = randn(1, 5)
    out, _ = execute(torch.cat([x, -x]))  # their product is -1, that of rows of zeros 0
    assert out["nearest"].tolist() == [1, 0]


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


def test_the_nearest_of_rows_that_all_point_apart_is_found():
    # Corners of a simplex, moved a little: every product is negative, and the larger the nearer.
    rows = SMALL
    x = torch.eye(rows) - 1 / rows + randn(rows, rows, scale=0.005)
    unit = torch.nn.functional.normalize(x.double())
    products = unit @ unit.T
    assert (products - 2 * torch.eye(rows)).max() < 0
    out, _ = execute(x)
    assert torch.equal(out["nearest"], products.fill_diagonal_(-torch.inf).argmax(dim=1))


def test_a_product_that_underflows_from_below_ties_with_zero():
    # Whole tiles of channels: what fills one would turn -0 into 0.
    x = torch.zeros(3, 64)
    x[:, :3] = torch.eye(3)
    x[0, 63], x[1, 63] = 1e-25, -1e-25
    assert (x[0, 63] * x[1, 63]).signbit()
    out, _ = execute(x)
    assert out["nearest"].tolist() == [1, 0, 0]


def test_rows_no_longer_than_eps_match_the_reference():
    x = randn(SMALL, 40)
    x[4] = 0.0
    x[9] *= 0.1 * EPS / x[9].norm()
    out, _ = execute(x)
    low, truth = reference(x), reference(x.double())
    assert_within_error_budget(
        out["losses"].double().mean().float(),
        low_precision=low[0],
        truth=truth[0],
        name="koleo.loss",
    )
    # Gradients of short rows are 1/EPS times as large as those of the others.
    for name, rows in (("short", [4, 9]), ("others", sorted({*range(SMALL)} - {4, 9}))):
        assert_within_error_budget(
            out["dx"][rows], low_precision=low[1][rows], truth=truth[1][rows], name=f"koleo.{name}"
        )


# What fills a tile is no number of the first row, which is the one that has none to take instead.
@pytest.mark.parametrize(("row", "instead"), [(15, 0), (0, 1)])
def test_nan_in_a_row_stays_in_its_loss(row: int, instead: int):
    x = randn(SMALL, 40)
    x[row] = x[3].neg()  # nobody's nearest, with or without NaN
    clean, _ = execute(x)
    x[row, 0] = torch.nan
    dirty, _ = execute(x)
    others = torch.arange(SMALL) != row
    for name in ("losses", "dx", "normalised"):
        assert dirty[name][row].isnan().all()
    for name in ("losses", "nearest"):
        assert torch.equal(dirty[name][others], clean[name][others])
    # Without a nearest row it takes the first other one, which its pull then reaches.
    assert dirty["nearest"][row] == instead
    others[[instead, int(clean["nearest"][row])]] = False
    assert torch.equal(dirty["dx"][others], clean["dx"][others])


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
