"""Programs nobody here wrote: what Triton compiled must compute what NumPy does."""

from __future__ import annotations

import pytest

from tools.simt.proofs.triton_programs import HOPPER_PROGRAMS, PROGRAMS

pytest.importorskip("triton")
LONG = {"matmul in tf32", "matmul", "matmul of float16"}


ON_BOTH = [(80, name) for name in PROGRAMS] + [(90, name) for name in HOPPER_PROGRAMS]


@pytest.mark.parametrize(("arch", "name"), ON_BOTH)
def test_in_lockstep(arch: int, name: str):
    run, tolerance = HOPPER_PROGRAMS[name]
    error, _ = run(arch)
    assert error <= tolerance


@pytest.mark.parametrize(
    ("arch", "name"),
    [pytest.param(*key, marks=[pytest.mark.slow] if key[1] in LONG else []) for key in ON_BOTH],
)
def test_in_random_order(arch: int, name: str):
    run, tolerance = HOPPER_PROGRAMS[name]
    error, _ = run(arch, schedule=1)
    assert error <= tolerance
