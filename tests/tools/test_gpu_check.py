"""`make gpu-check`, as far as a machine without a GPU can tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dinov2_fast.bench.report import markdown, read_rows
from tests.source_files import ROOT
from tools import gpu_check

OP_ROW = {
    "op": "gelu",
    "mode": "forward",
    "backend": "native",
    "dtype": "bfloat16",
    "shape": [58496, 4096],
    "device": "cuda",
    "median_us": 400.0,
    "gb_s": 2400.0,
    "share_of_copy_bandwidth": 0.9,
    "bytes": 1,
    "threads": "1",
    "hardware": "NVIDIA Test 80GB",
    "torch": "2.14.1",
}
STEP_ROW = {
    **{"kind": "step", "arch": "vits14", "dtype": "bf16", "prototypes": 65536, "batch_size": 32},
    **{"backend": "native", "device": "cuda", "rounds": 1, "hardware": "NVIDIA Test 80GB"},
    "threads": 1,
    **{"seconds": {"fast": 0.05}, "peak_mib": {"fast": 4000.0}, "torch": "2.14.1"},
    **{"speed_ratio": 2.5, "memory_ratio": 6.0, "saved_bytes_ratio": 7.0, "arithmetic_ratio": 2.5},
    **{"speed_ratio_range": [2.5, 2.5], "memory_ratio_range": [6.0, 6.0]},
    "share_of_matmul": {"fast": 0.3, "reference": 0.2},
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A machine that seems to have a GPU; the processes started, which write their rows."""
    started: list[list[str]] = []

    def run(words: list[str], *, env: dict[str, str], **_: Any) -> SimpleNamespace:
        started.append(words)
        for flag, row in (("--rows", OP_ROW), ("--append", STEP_ROW)):
            if flag in words:
                backend = env.get("DINOV2_FAST_PREFER", row["backend"])
                with Path(words[words.index(flag) + 1]).open("a") as file:
                    file.write(json.dumps({**row, "backend": backend}) + "\n")
        return SimpleNamespace(returncode=int("gpu" in words))  # the tests fail

    properties = SimpleNamespace(memory_clock_rate=2_000_000, memory_bus_width=5120)
    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test 80GB")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    return started


def test_a_dry_run_lists_the_commands_of_every_part(capsys: pytest.CaptureFixture[str]):
    assert gpu_check.main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("-m pytest" in line for line in lines) == 2
    steps = [line for line in lines if "bench step" in line]
    preferred = {line.split()[0] for line in steps}
    assert preferred == {f"DINOV2_FAST_PREFER={name}" for name in ("reference", "native", "triton")}
    assert gpu_check.main(["--dry-run", "--only", "ops"]) == 0
    assert capsys.readouterr().out == lines[1] + "\n"


@pytest.mark.parametrize("part", ["ops", "steps"])
def test_the_commands_are_ones_that_the_package_takes(part: str, tmp_path: Path):
    words = list(gpu_check.commands(tmp_path / "rows.jsonl", [part])[0].words)
    if part == "ops":  # one file stands for the folder
        words[words.index("benchmarks")] = "benchmarks/bench_gelu.py"
        words += ["--collect-only"]
    else:
        words += ["--rounds", "0"]  # refused, but after every other word was taken
    # A process among several that share the tests would not time anything.
    alone = {key: value for key, value in os.environ.items() if "XDIST" not in key}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=alone, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    if part == "ops":
        assert done.returncode == 0, said
        assert "test_gelu[native-cuda" in said
        assert "cpu" not in said
    else:
        assert "--rounds must be at least 1" in said


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu_check.main([]) == 2
    said = capsys.readouterr()
    assert "no CUDA device" in said.err
    assert said.err.count("\n") == 1
    assert not said.out


def test_rows_are_written_and_a_failure_is_not_hidden(
    gpu: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "test.jsonl"
    assert gpu_check.main(["--out", str(out)]) == 1
    assert len(gpu) == len(gpu_check.commands(out))
    said = capsys.readouterr()
    assert "failed: python -m pytest -q tests -m gpu" in said.err
    assert "2400 GB/s   90% of copy   94% of nominal" in said.out  # 2 * 2 GHz * 640 bytes
    rows = read_rows([out])
    assert [row["backend"] for row in rows if "seconds" in row] == 2 * gpu_check.STEP_BACKENDS
    page = markdown(rows)
    assert "| backend |" in page
    assert "| triton |" in page


def test_a_part_replaces_its_own_rows_only(gpu: list[list[str]], tmp_path: Path):
    out = tmp_path / "test.jsonl"
    before = [{**OP_ROW, "backend": "reference"}, STEP_ROW]
    out.write_text("".join(json.dumps(row) + "\n" for row in before))
    assert gpu_check.main(["--only", "ops", "--out", str(out)]) == 0
    rows = read_rows([out])
    assert rows[0] == STEP_ROW
    assert [row["backend"] for row in rows[1:]] == ["native"]


def test_the_file_is_named_after_the_machine():
    assert gpu_check.machine_name("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
