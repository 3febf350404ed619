"""The Triton kernels' own tests, with the PTX of sm_80 and sm_90 executed on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What compiles or checks schemas launches nothing new.
CHOSEN = "triton and not compil and not opcheck and not gradcheck"
STEMS = (
    *("attention", "cross_entropy", "gelu", "koleo", "layer_norm", "optimizer"),
    *("sinkhorn", "stochastic_depth", "swiglu"),
)
# Part of two of them in every run: plain kernels, and products of bfloat16 by wgmma.
QUICK = {
    "swiglu-80": CHOSEN,
    "attention-90-forward": "triton and test_matches_reference and dtype1",
}
ALL = {f"{stem}-{arch}": CHOSEN for stem in STEMS for arch in (80, 90)}
CASES = [
    *(pytest.param(*key.split("-")[:2], chosen, id=key) for key, chosen in QUICK.items()),
    *(
        pytest.param(*key.split("-"), chosen, id=key, marks=pytest.mark.slow)
        for key, chosen in ALL.items()
        if key not in QUICK
    ),
]

pytest.importorskip("triton")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("stem", "arch", "chosen"), CASES)
def test_kernels_pass_their_tests_as_ptx(stem: str, arch: str, chosen: str):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "tests.cuda.triton_on_ptx"),
            *(f"tests/ops/test_{stem}.py", "-k", chosen),
        ],
        cwd=ROOT,
        env={**os.environ, "SIMT_ARCH": arch, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    launches = re.search(r"(\d+) launches executed", done.stdout)
    assert launches
    assert int(launches[1]) > 0
