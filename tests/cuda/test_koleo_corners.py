"""What KoLeo's kernels, CUDA's and Triton's, make of ties, negative products, NaN and no length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast import environment
from tests.cuda import koleo_calls, native_on_ptx
from tests.cuda.koleo_calls import EPS, LARGE, SMALL, Outputs, reference
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget

Execute = Callable[[Tensor], tuple[Outputs, list[Any]]]


@pytest.fixture(params=["native", pytest.param("triton", marks=pytest.mark.slow)])
def execute(request: pytest.FixtureRequest) -> Execute:
    """A backend's kernels, executed without a GPU."""
    if request.param == "native" and native_on_ptx.why_not():
        pytest.skip(native_on_ptx.why_not())
    if request.param == "triton":
        pytest.importorskip("triton")
        if environment.triton_interpreted():
            pytest.skip("Triton interprets")
    return getattr(koleo_calls, request.param)


@pytest.mark.parametrize("rows", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)])
def test_the_lowest_of_equal_rows_is_found(execute: Execute, rows: int):
    # Five of each: they are in other lanes, warps, tiles and splits.
    kinds = torch.arange(rows) % (rows // 5)
    kinds = kinds[torch.randperm(rows)]
    x = randn(rows // 5, 40)[kinds]
    out, _ = execute(x)
    equal = kinds[:, None] == kinds[None, :]
    expected = equal.fill_diagonal_(False).int().argmax(dim=1)
    assert torch.equal(out["nearest"], expected)
    assert torch.equal(out["dx"], torch.zeros_like(x))


def test_opposite_rows_prefer_each_other_to_what_fills_a_tile(execute: Execute):
    x = randn(1, 5)
    out, _ = execute(torch.cat([x, -x]))  # their product is -1, that of rows of zeros 0
    assert out["nearest"].tolist() == [1, 0]


def test_the_nearest_of_rows_that_all_point_apart_is_found(execute: Execute):
    # Corners of a simplex, moved a little: every product is negative, and the larger the nearer.
    rows = SMALL
    x = torch.eye(rows) - 1 / rows + randn(rows, rows, scale=0.005)
    unit = torch.nn.functional.normalize(x.double())
    products = unit @ unit.T
    assert (products - 2 * torch.eye(rows)).max() < 0
    out, _ = execute(x)
    assert torch.equal(out["nearest"], products.fill_diagonal_(-torch.inf).argmax(dim=1))


def test_a_product_that_underflows_from_below_ties_with_zero(execute: Execute):
    # Whole tiles of channels: what fills one would turn -0 into 0.
    x = torch.zeros(3, 64)
    x[:, :3] = torch.eye(3)
    x[0, 63], x[1, 63] = 1e-25, -1e-25
    assert (x[0, 63] * x[1, 63]).signbit()
    out, _ = execute(x)
    assert out["nearest"].tolist() == [1, 0, 0]


def test_rows_no_longer_than_eps_match_the_reference(execute: Execute):
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


def test_rows_apart_by_little_more_than_eps_match_the_reference(execute: Execute):
    # Lengths are exact: the distance of the first two is that of their last numbers, and of eps.
    x = torch.tensor([[1.0, 0.0], [1.0, 1e-7], [-1.0, 0.5], [-1.0, -0.5]])
    out, _ = execute(x)
    low, truth = reference(x), reference(x.double())
    for name, found, one, exact in (
        ("loss", out["losses"].double().mean().float(), low[0], truth[0]),
        ("near", out["dx"][:2], low[1][:2], truth[1][:2]),  # 1e7 times as large as the others'
        ("others", out["dx"][2:], low[1][2:], truth[1][2:]),
    ):
        assert_within_error_budget(found, low_precision=one, truth=exact, name=f"koleo.{name}")


# What fills a tile is no number of the first row, which is the one that has none to take instead.
@pytest.mark.parametrize(("row", "instead"), [(15, 0), (0, 1)])
def test_nan_in_a_row_stays_in_its_loss(execute: Execute, row: int, instead: int):
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
