"""Triton's attention as PTX: other queries than keys, and scales of any sign."""

from __future__ import annotations

import pytest
import torch

from dinov2_fast import environment
from tests.cuda.attention_calls import (
    BOTH_LEFT,
    SCALE,
    UNEQUAL,
    Case,
    assert_matches_reference,
    execute_triton,
    make_inputs,
)

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(environment.triton_interpreted(), reason="Triton interprets"),
]


@pytest.mark.parametrize(
    ("case", "dtype", "scale"),
    [
        *((UNEQUAL, dtype, SCALE) for dtype in (torch.bfloat16, torch.float16)),
        # Masks in the last tile, of weights that are largest or even there.
        *((BOTH_LEFT, torch.bfloat16, scale) for scale in (-SCALE, 0.0, 3.0)),
    ],
    ids=str,
)
def test_output_and_gradients_match_the_reference(case: Case, dtype: torch.dtype, scale: float):
    inputs = make_inputs(case, dtype)
    out, _ = execute_triton(case, inputs, scale)
    assert_matches_reference(case, inputs, out, scale)
