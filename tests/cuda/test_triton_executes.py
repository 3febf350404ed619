"""The Triton kernels' own tests, with the PTX of sm_80 and sm_90 executed on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What compiles or checks schemas launches nothing new. On the CPU attention asks for tf32 products
# of float32, which are no match for its float32 budget.
LEFT_OUT = "not compil and not opcheck and not gradcheck"
ATTENTION = f"{LEFT_OUT} and matches_reference and not dtype0"
FILES = {
    "swiglu": LEFT_OUT,
    "gelu": LEFT_OUT,
    "layer_norm": LEFT_OUT,
    "stochastic_depth": LEFT_OUT,
    "cross_entropy": LEFT_OUT,
    "sinkhorn": LEFT_OUT,
    "attention": ATTENTION,
}  # not the optimizer: it finds its tensors through a table of addresses
QUICK = {("swiglu", 80), ("attention", 90)}

pytest.importorskip("triton")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("stem", "arch"),
    [
        pytest.param(stem, arch, marks=[] if (stem, arch) in QUICK else [pytest.mark.slow])
        for stem in FILES
        for arch in (80, 90)
    ],
)
def test_kernels_pass_their_tests_as_ptx(stem: str, arch: int):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "tests.cuda.triton_on_ptx"),
            *(f"tests/ops/test_{stem}.py", "-k", f"triton and {FILES[stem]}"),
        ],
        cwd=ROOT,
        env={**os.environ, "SIMT_ARCH": str(arch), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    launches = re.search(r"(\d+) launches executed", done.stdout)
    assert launches
    assert int(launches[1]) > 0
