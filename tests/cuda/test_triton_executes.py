"""The Triton kernels' own tests on the CPU: PTX of sm_80 and sm_90, and Triton's interpreter."""

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


def said_by_pytest(*words: str, **environment: str) -> str:
    """What a run of pytest says that must pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("stem", "arch", "chosen"), CASES)
def test_kernels_pass_their_tests_as_ptx(stem: str, arch: str, chosen: str):
    words = ("-p", "tests.cuda.triton_on_ptx", f"tests/ops/test_{stem}.py", "-k", chosen)
    launches = re.search(r"(\d+) launches executed", said_by_pytest(*words, SIMT_ARCH=arch))
    assert launches
    assert int(launches[1]) > 0


def test_matrices_in_tiles_pass_their_tests_interpreted():
    words = ("tests/ops/test_gelu.py", "-k", "triton and matches_reference")
    assert " passed" in said_by_pytest(*words, TRITON_INTERPRET="1")


# At the sizes of a GPU's tests too, which would take hours as PTX.
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("folder", ["", "without_autograd/", "gpu/"])
@pytest.mark.parametrize("stem", STEMS)
def test_kernels_pass_their_tests_interpreted(stem: str, folder: str):
    file = f"tests/ops/{folder}test_{stem}.py"
    if not (ROOT / file).exists():
        pytest.skip(f"there is no {file}")
    words = (file, "-k", "(triton or gpu) and not inductor")
    assert " passed" in said_by_pytest(*words, TRITON_INTERPRET="1")
