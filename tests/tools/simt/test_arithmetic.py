from __future__ import annotations

import shutil

import pytest

from tools.simt.proofs import arithmetic

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]


def test_expressions_compiled_by_nvcc_and_gpp_agree_in_every_bit():
    outcome = arithmetic.prove()
    assert len(outcome.expressions) >= 120
    assert not outcome.wrong, "\n".join(outcome.wrong)
