"""Programs nobody here wrote: what Triton compiled must compute what NumPy does."""

from __future__ import annotations

import pytest

from tools.simt.proofs.triton_programs import PROGRAMS

pytest.importorskip("triton")
LONG = {"matmul in tf32"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_in_lockstep_on_sm_80(name: str):
    run, tolerance = PROGRAMS[name]
    error, _ = run(80)
    assert error <= tolerance


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in PROGRAMS]
)
def test_in_random_order_on_sm_80(name: str):
    run, tolerance = PROGRAMS[name]
    error, _ = run(80, schedule=1)
    assert error <= tolerance
