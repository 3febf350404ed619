"""What attention's kernels, CUDA's and Triton's, make of extreme scores and keys of weight 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dinov2_fast import environment
from tests.cuda import native_on_ptx
from tests.cuda.attention_calls import (
    BOTH_LEFT,
    Case,
    Outputs,
    assert_matches_reference,
    execute_triton,
    make_inputs,
)
from tests.cuda.attention_calls import (
    execute as execute_native,
)

Execute = Callable[..., tuple[Outputs, list[Any]]]


@pytest.fixture(params=["native", pytest.param("triton", marks=pytest.mark.slow)])
def execute(request: pytest.FixtureRequest) -> Execute:
    """A backend's kernels, executed without a GPU."""
    if request.param == "native":
        if native_on_ptx.why_not():
            pytest.skip(native_on_ptx.why_not())
        return execute_native
    pytest.importorskip("triton")
    if environment.triton_interpreted():
        pytest.skip("Triton interprets")
    return execute_triton


@pytest.mark.parametrize("lengths", [(33,), (265,)], ids=["one kernel", "two kernels"])
def test_extreme_scores_meet_no_padding(execute: Execute, lengths: tuple[int, ...]):
    # lse far below 0, where exp2(0 - lse) of a column that is not there overflows; and an infinite
    # key of weight 0, whose product with a query that is not there is NaN.
    case = (lengths, (33,), 1)
    inputs = make_inputs(case, torch.bfloat16)
    q, k = inputs["q"], inputs["k"]
    q[..., 0], k[..., 0] = 40, -40
    q[..., 3], k[5, :, 3] = 1, -torch.inf
    out, _ = execute(case, inputs)
    assert out["lse"].max() < -100
    assert out["d_v"].isfinite().all()
    assert_matches_reference(case, inputs, out)


# Scores of -inf at first: in the first tile of a sequence, in the keys that a kernel takes first,
# and in all but a few.
@pytest.mark.parametrize(
    ("case", "masked"),
    [
        (((33,), (70,), 1), slice(0, 64)),
        (BOTH_LEFT, slice(256, 258)),
        (BOTH_LEFT, slice(0, 192)),
        (BOTH_LEFT, slice(0, 253)),
    ],
)
def test_keys_of_weight_zero_come_before_others(execute: Execute, case: Case, masked: slice):
    inputs = make_inputs(case, torch.bfloat16)
    inputs["q"][..., 0], inputs["k"][masked, :, 0] = 1, -torch.inf
    out, _ = execute(case, inputs)
    assert out["out"].isfinite().all()
    assert_matches_reference(case, inputs, out)
