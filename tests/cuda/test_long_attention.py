"""The CUDA attention kernels at 1370 tokens, a 518 px image, with warps and CTAs in any order.

One head of one sequence: other heads and sequences are other CTAs, which tests of short ones have.
"""

from __future__ import annotations

import pytest
import torch

from tests.cuda import native_on_ptx
from tests.cuda.attention_calls import (
    Case,
    adds,
    assert_matches_reference,
    equal,
    execute,
    make_inputs,
)

pytestmark = [
    pytest.mark.skipif(bool(native_on_ptx.why_not()), reason=native_on_ptx.why_not()),
    pytest.mark.slow,
]

LONG: Case = ((1370,), (1370,), 1)
# In any order a test takes minutes: all columns pass by three CTAs of rows, of which one has two
# rows, once as keys of queries and once as queries of keys.
SIDES: list[Case] = [((258,), (1370,), 1), ((1370,), (258,), 1)]
LANES = 512  # of the CTAs that run at a time: an instruction costs as if all of them ran it


@pytest.mark.parametrize(("dtype", "arch"), [(torch.bfloat16, 80), (torch.float16, 90)])
@pytest.mark.parametrize("deterministic", [True, False])
def test_matches_the_reference(dtype: torch.dtype, arch: int, deterministic: bool):
    inputs = make_inputs(LONG, dtype)
    out, results = execute(LONG, inputs, arch=arch, deterministic=deterministic)
    assert [adds(result) for result in results] == [False, not deterministic, False]
    assert_matches_reference(LONG, inputs, out)


@pytest.mark.parametrize("case", SIDES, ids=str)
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_order_of_warps_changes_no_bit_but_of_sums_in_any_order(
    case: Case, deterministic: bool
):
    inputs = make_inputs(case, torch.bfloat16)
    options = {"deterministic": deterministic, "lanes": LANES}
    out, _ = execute(case, inputs, **options)
    shuffled, _ = execute(case, inputs, schedule=1, **options)
    assert_matches_reference(case, inputs, shuffled)
    if not deterministic:
        del out["d_q"]
    assert equal(out, shuffled)
