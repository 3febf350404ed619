from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]


def selfcheck(*options: str) -> dict:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tools.simt.selfcheck", "--json", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_errors_in_the_interpreter_are_found():
    found = selfcheck("--only", "mutants")["mutants"]
    assert found["mutants"] >= 7
    assert found["killed"] == found["mutants"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_proofs_in_full():
    found = selfcheck("--full")
    assert found["arithmetic"]["expressions"] >= 120
    assert found["mutants"]["mutants"] >= 40
    assert found["deletions"]["deleted"] >= 30
