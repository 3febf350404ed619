"""Triton's KoLeo at ViT-B's width, executed as PTX with warps in any order."""

from __future__ import annotations

import pytest

from dinov2_fast import environment
from tests.cuda.koleo_calls import among_nan, assert_matches_reference, same, triton
from tests.inputs import randn
from tools.simt.faults import Checks

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(environment.triton_interpreted(), reason="Triton interprets")


# The fewest rows, and a prime number of them: two tiles of 32 and three more.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "arch"), [((2, 768), 80), ((2, 768), 90), ((67, 768), 80)], ids=str
)
def test_kernels_match_the_reference_with_the_same_bits_in_any_order(
    shape: tuple[int, int], arch: int
):
    x = randn(*shape)
    out, results = triton(among_nan(x), arch=arch)
    assert len(results) == 4
    assert_matches_reference(x, out)
    # Lanes of several warps store what they hold alike: out of lockstep, that counts as a race.
    checks = Checks(same_store=False, race=False)
    assert same(out, triton(among_nan(x), arch=arch, schedule=1, checks=checks)[0])
