from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent.parent / "csrc" / "cuda" / "swiglu.cu"
KERNELS = 2 * 3 * 2  # forward and backward; float32, float16, bfloat16; vectors and elements
# 65536 registers of an SM / (2048 resident threads / 2): half occupancy hides the memory's latency.
MAX_REGISTERS = 64


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """What ptxas says about the file's kernels, and their PTX."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp(request.param)
    done = subprocess.run(
        [
            "nvcc",
            "-cubin",
            f"-arch={request.param}",
            "-std=c++17",
            "-O3",
            "--expt-relaxed-constexpr",
            "-Xptxas=-v,--warn-on-spills",
            f"-I{SOURCE.parent.parent}",
            f"-I{pybind11.get_include()}",
            f"-I{sysconfig.get_path('include')}",
            "--keep",
            f"--keep-dir={folder}",
            f"--output-file={folder / 'swiglu.cubin'}",
            str(SOURCE),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout, (folder / "swiglu.ptx").read_text()


def test_kernels_fit_in_registers_without_spills(compiled: tuple[str, str]):
    said, _ = compiled
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert spills == [("0", "0", "0")] * KERNELS
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == KERNELS
    assert max(registers) <= MAX_REGISTERS


def test_vector_kernels_move_16_bytes_at_a_time(compiled: tuple[str, str]):
    _, ptx = compiled
    kernels = re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, flags=re.DOTALL)
    assert len(kernels) == KERNELS
    for name, body in kernels:
        backward = "backward" in name
        loads = len(re.findall(r"ld\.global\.nc\.v4\.u32", body))
        stores = len(re.findall(r"st\.global\.wb\.v4\.u32", body))
        other = len(re.findall(r"(?:ld|st)\.(?:global|local)", body)) - loads - stores
        if "Li1E" in name:  # the template argument kVector: one element at a time
            assert (loads, stores) == (0, 0), name
            assert other % (5 if backward else 3) == 0, name  # the loop may be unrolled
        else:
            assert (loads, stores, other) == ((3, 2, 0) if backward else (2, 1, 0)), name
