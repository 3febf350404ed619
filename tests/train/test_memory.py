"""Freed memory is reused: counted as page faults, in a process of its own since it stays so."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

# Blocks of 24 MiB, and of 48: by itself glibc comes to keep those of up to 32 MiB alone.
COUNT_FAULTS = """
import json, resource, torch
from dinov2_fast.train.memory import reuse_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.zeros(size * 2**20) for size in (6, 12) for _ in range(3)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def faults_of_steps():
    faults_of_a_step()
    return [faults_of_a_step() for _ in range(4)]

before = faults_of_steps()
print(json.dumps({"taken": reuse_freed_memory(), "before": before, "after": faults_of_steps()}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_step_reuses_the_memory_of_the_one_before():
    finished = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS], check=True, capture_output=True, text=True
    )
    found = json.loads(finished.stdout)

    assert found["taken"]
    assert sum(found["after"]) <= sum(found["before"]) / 20, found
