"""Sums over rows when a program takes several tiles, as it does of any pack on a GPU.

The tests' other tensors have so few rows that every tile gets a program of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinov2_fast import environment
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget
from tools.simt.triton_launch import triton_on_cpu

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(environment.triton_interpreted(), reason="Triton interprets")

# Five tiles of 16 rows or 17 of 4, the last not whole, for two programs.
ROWS, WIDTH, PROGRAMS = 67, 40, 2
# What a backward wrote, the sums of its columns [C], and their terms in float64 [R, C].
Found = tuple[Tensor, Tensor, Tensor]


def layer_norm(kernels) -> Found:
    dx, dy, x_hat = (randn(ROWS, WIDTH, seed=seed) for seed in range(3))
    weight, rstd = randn(WIDTH, seed=3), randn(ROWS, seed=4).abs()
    sums = kernels.backward(dx, dy, x_hat, None, rstd, weight, None, None, None, add=True)
    return dx, sums.flatten(), torch.cat([dy.double() * x_hat.double(), dy.double()], dim=1)


def stochastic_depth(kernels) -> Found:
    dx, residual = randn(ROWS, WIDTH), randn(ROWS, WIDTH, seed=1)
    g = torch.empty(ROWS, WIDTH)
    sums = kernels.gather(dx, None, None, None, residual, g, want_sums=True)
    return g, sums, dx.double() * residual.double()


def gelu(kernels) -> Found:
    da, x, dx = randn(ROWS, WIDTH), randn(ROWS, WIDTH, seed=1), torch.empty(ROWS, WIDTH)
    sums = kernels.backward(da, x, dx, None, want_sums=True)
    return dx, sums, dx.double()


def swiglu(kernels) -> Found:
    dh, x12, dx12 = randn(ROWS, WIDTH), randn(ROWS, 2 * WIDTH, seed=1), torch.empty(ROWS, 2 * WIDTH)
    sums = kernels.backward(dh, x12, dx12, None, want_sums=True)
    return dx12, sums, dx12.double()


CASES = [
    pytest.param(call, marks=[] if call is stochastic_depth else pytest.mark.slow)
    for call in (gelu, layer_norm, stochastic_depth, swiglu)
]


@pytest.mark.parametrize("backward", CASES)
def test_few_programs_write_what_many_do_and_sum_it_up(
    backward: Callable[..., Found], monkeypatch: pytest.MonkeyPatch
):
    kernels = importlib.import_module(f"dinov2_fast.kernels.{backward.__name__}")
    with triton_on_cpu(80) as launches:
        expected, *_ = backward(kernels)
        monkeypatch.setattr(kernels, "NUM_PROGRAMS", PROGRAMS)
        found, sums, terms = backward(kernels)
    assert [launch.num_ctas for launch in launches] == [launches[0].num_ctas, PROGRAMS]
    assert launches[0].num_ctas > 2 * PROGRAMS
    assert torch.equal(found, expected)
    low, truth = terms.float().sum(0), terms.sum(0)
    assert_within_error_budget(sums, low_precision=low, truth=truth, name="sums")
