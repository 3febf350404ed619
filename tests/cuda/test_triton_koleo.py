"""Triton's KoLeo at ViT-B's width, executed as PTX with warps in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast import environment
from tests.cuda.koleo_calls import EPS, Outputs, among_nan, assert_matches_reference, same
from tests.inputs import randn
from tools.simt.faults import Checks
from tools.simt.triton_launch import triton_on_cpu

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(environment.triton_interpreted(), reason="Triton interprets")


def execute(x: Tensor, arch: int, **options: Any) -> Outputs:
    """What the kernels write about rows, forward and backward, over NaN."""
    from dinov2_fast.kernels import koleo as kernels

    rows = len(x)
    losses, norms, pulls = (torch.full((rows,), torch.nan) for _ in range(3))
    normalised, dx = (torch.full(x.shape, torch.nan) for _ in range(2))
    nearest = torch.full((rows,), -1)
    with triton_on_cpu(arch, **options) as results:
        kernels.forward(x, losses, normalised, norms, nearest, pulls, EPS)
        gradients = torch.full((rows,), 1 / rows)
        kernels.backward(gradients, normalised, norms, nearest, pulls, dx, EPS)
    assert len(results) == 4
    outputs = {"losses": losses, "norms": norms, "pulls": pulls, "nearest": nearest}
    return outputs | {"normalised": normalised, "dx": dx}


# The fewest rows, and a prime number of them: two tiles of 32 and three more.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "arch"), [((2, 768), 80), ((2, 768), 90), ((67, 768), 80)], ids=str
)
def test_kernels_match_the_reference_with_the_same_bits_in_any_order(
    shape: tuple[int, int], arch: int
):
    x = randn(*shape)
    out = execute(among_nan(x), arch)
    assert_matches_reference(x, out)
    # Lanes of several warps store what they hold alike: out of lockstep, that counts as a race.
    checks = Checks(same_store=False, race=False)
    assert same(out, execute(among_nan(x), arch, schedule=1, checks=checks))
