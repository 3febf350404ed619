"""Stochastic depth in place, and its gradient: what a block's own backward is made of."""

from __future__ import annotations

import pytest
import torch

from dinov2_fast.ops.stochastic_depth import (
    KeptRows,
    gather_scaled,
    scatter_add_scaled_,
)
from dinov2_fast.packing import Pack
from tests.inputs import GROUPS, randn
from tests.ops.test_stochastic_depth import draw, make_inputs
from tests.tolerance import assert_within_error_budget

# Types of the residual stream, and of what the branch works in.
TYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


def raw_outputs(
    inputs: list, kept: KeptRows | None, out_dtype: torch.dtype, backend: str
) -> list[torch.Tensor]:
    """x after the scatter in place, and gradient rows and sums of the gather."""
    x, residual, gamma = inputs
    rows, row_scale = (None, None) if kept is None else (kept.rows, kept.row_scale)
    out = x.clone()
    scatter_add_scaled_(out, residual, rows, row_scale, gamma, backend=backend)
    return [out, *gather_scaled(x, rows, row_scale, out_dtype=out_dtype, backend=backend)]


def assert_raw_within_budget(
    inputs: list, kept: KeptRows | None, out_dtype: torch.dtype, backend: str
) -> None:
    out = raw_outputs(inputs, kept, out_dtype, backend)
    low_precision = raw_outputs(inputs, kept, out_dtype, "reference")
    wide = [None if tensor is None else tensor.double() for tensor in inputs]
    truth = raw_outputs(wide, kept, torch.float64, "reference")
    for name, *candidates in zip(("x", "g", "sums"), out, low_precision, truth, strict=True):
        assert_within_error_budget(
            candidates[0],
            low_precision=candidates[1],
            truth=candidates[2],
            name=f"stochastic_depth.{name}",
        )


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("types", TYPE_PAIRS, ids=str)
@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("with_gamma", [False, True])
def test_in_place_and_gather_without_autograd_match_reference(
    groups: tuple,
    types: tuple[torch.dtype, torch.dtype],
    all_rows: bool,
    with_gamma: bool,
    backend: str,
    device: str,
):
    (x, residual, gamma), kept = make_inputs(groups, types[0], device)
    residual = (x.flip(0) if all_rows else residual).to(types[1])
    inputs = [x, residual, gamma.float() if with_gamma else None]
    assert_raw_within_budget(inputs, None if all_rows else kept, types[1], backend)


@pytest.mark.parametrize("types", TYPE_PAIRS, ids=str)
def test_every_instruction_set_is_within_budget_on_every_tail(
    level: str,
    types: tuple[torch.dtype, torch.dtype],
):
    kept = draw(Pack.from_groups([(5, 2)]))
    for channels in range(67):  # every tail of vectors of up to 32 elements, and past two of them
        x = 2 + randn(10, channels, dtype=types[0], seed=channels)  # sums that do not cancel
        residual = randn(6, channels, dtype=types[1], seed=channels + 1)
        assert_raw_within_budget([x, residual, randn(channels)], kept, types[1], "native")


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [384, 389])  # 389: most rows begin at no vector; both: a tail
def test_many_gathered_rows_come_out_as_few_do(
    channels: int, out_dtype: torch.dtype, on_native: None
):
    x = randn(1501, channels)  # in bf16 more than the MiB from which rows are written past caches
    row_scale = torch.linspace(0.5, 2, 1501)
    many, _ = gather_scaled(x, None, row_scale, out_dtype=out_dtype)
    few = [
        gather_scaled(rows, None, scales, out_dtype=out_dtype)[0]
        for rows, scales in zip(x.split(100), row_scale.split(100), strict=True)
    ]
    assert torch.equal(many, torch.cat(few))


@pytest.mark.parametrize("num_rows", [1024, 100])  # written past the caches from 1 MiB on, or not
def test_floats_around_every_bfloat16_round_by_definition(num_rows: int, level: str):
    lower = torch.tensor([0, 1, 0x4000, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFF])
    bits = (torch.arange(1 << 16)[:, None] << 16 | lower).flatten()
    # Shuffled, so that vectors hold NaNs beside other numbers.
    bits = bits[torch.randperm(bits.numel(), generator=torch.Generator().manual_seed(0))]
    bits = bits.view(1024, 512)[:num_rows]
    x = bits.to(torch.uint32).view(torch.float32)
    out, _ = gather_scaled(x, None, None, out_dtype=torch.bfloat16, backend="native")
    rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    expected = torch.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
    assert torch.equal(out.view(torch.int16).long() & 0xFFFF, expected)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_result_does_not_depend_on_the_number_of_threads(threads: int, on_native: None):
    x, residual = randn(1031, 384), randn(1031, 384, seed=1)  # 12 threads' worth
    inputs = [x, residual, randn(384, seed=2)]
    expected = raw_outputs(inputs, None, torch.bfloat16, "native")
    try:
        torch.set_num_threads(threads)
        out = raw_outputs(inputs, None, torch.bfloat16, "native")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_rows_that_are_not_kept_stay_bit_equal_in_place(backend: str, device: str):
    (x, residual, gamma), kept = make_inputs(((5, 7),), torch.float32, device)
    out = x.clone()
    scatter_add_scaled_(out, residual, kept.rows, kept.row_scale, gamma, backend=backend)
    dropped = torch.ones(35, dtype=torch.bool, device=device)
    dropped[kept.rows] = False
    assert torch.equal(out[dropped], x[dropped])
    assert not torch.equal(out[~dropped], x[~dropped])


def test_functions_without_autograd_reject_bad_input():
    x, rows, ones = randn(5, 4), torch.tensor([0, 3]), torch.ones(2)
    with pytest.raises(ValueError, match=r"scatter_add_scaled_: residual must have shape \[2, 4\]"):
        scatter_add_scaled_(x, randn(3, 4), rows, ones, None)
    with pytest.raises(ValueError, match=r"scatter_add_scaled_: residual must have shape \[5, 4\]"):
        scatter_add_scaled_(x, randn(3, 4), None, None, None)
    with pytest.raises(ValueError, match=r"gather_scaled: rows must be in \[0, 5\)"):
        gather_scaled(x, torch.tensor([5]), None)
    with pytest.raises(ValueError, match=r"gather_scaled: row_scale must have shape \[2\]"):
        gather_scaled(x, rows, torch.ones(3))
