from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tools import simt
from tools.simt import compile as nvcc
from tools.simt.parse import parse

PROGRAMS = Path(__file__).parent / "programs"
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def test_the_same_text_is_compiled_and_parsed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    commands: list[list[str]] = []
    run = nvcc._run
    monkeypatch.setattr(nvcc, "_run", lambda command: commands.append(command) or run(command))
    monkeypatch.setattr(nvcc, "CACHE", tmp_path / "cache")
    source = tmp_path / "kernel.cu"
    source.write_text('extern "C" __global__ void one_kernel(int* x) { *x = ONE; }')

    def compiled(one: int, arch: str = "compute_80") -> str:
        return simt.compile_cu(source, arch, flags=[f"-DONE={one}"])

    ptx = compiled(1)
    assert compiled(1) == ptx
    assert sum("-ptx" in command for command in commands) == 1
    assert parse(compiled(1)) is parse(ptx)
    others = {compiled(3), compiled(1, "compute_90a")}
    source.write_text(source.read_text().replace("*x = ", "*x = 2 * "))
    assert len({ptx, *others, compiled(1)}) == 4
    assert sum("-ptx" in command for command in commands) == 4


def test_what_nvcc_refuses_is_said(tmp_path: Path):
    source = tmp_path / "kernel.cu"
    source.write_text("__global__ void kernel() { nothing(); }")
    with pytest.raises(RuntimeError, match='identifier "nothing" is undefined'):
        simt.compile_cu(source)


def test_an_unknown_form_is_named_only_where_it_is_executed():
    ptx = simt.compile_cu(PROGRAMS / "faults.cu", "compute_90a")
    out = np.ones(32, np.int32)
    simt.launch(ptx, "unknown_kernel", 1, 32, [simt.Output(out), 0])
    assert not out.any()
    with pytest.raises(simt.Fault) as caught:
        simt.launch(ptx, "unknown_kernel", 1, 32, [simt.Output(out), 1])
    assert caught.value.kind == "unsupported"
    assert caught.value.source[0] == "faults.cu"
    assert "mbarrier.pending_count.b64" in str(caught.value)
