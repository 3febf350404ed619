"""What nvcc says of the CUDA kernels: registers, spills and the width of their accesses."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.simt.compile import extension_folders

ROOT = Path(__file__).parents[2]
# Kernels of a file. Types of one op: 3; of stream and branch: 7; each in vectors and in elements.
# Second passes, which put together what CTAs have summed, are of one type and one form.
# KoLeo's search has two tiles; the optimizer's kernels choose a width for every tensor.
KERNELS = {
    "cross_entropy": 2 * 3 * 2 + 1,
    "gelu": 2 * 3 * 2,
    "koleo": (3 + 2) * 2,
    "layer_norm": 2 * 7 * 2,
    "sinkhorn": 2 * 3 * 2 + 2,
    "optimizer": 3,
    "stochastic_depth": 2 * 7 * 2,
    "swiglu": 2 * 3 * 2,
}
# 65536 registers of an SM / (2048 resident threads / 2): half occupancy hides the memory's latency.
MAX_REGISTERS = 64
# KoLeo's search hides latency by independent products in registers, not by more threads.
MAX_REGISTERS_OF = {"koleo": 128}

pytest.importorskip("pybind11")
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            (stem, arch), marks=[] if arch == "sm_80" else [pytest.mark.slow], id=f"{stem}-{arch}"
        )
        for stem in KERNELS
        for arch in ("sm_80", "sm_90")
    ],
)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A file's stem, what ptxas says about its kernels, and their PTX."""
    stem, arch = request.param
    folder = tmp_path_factory.mktemp(arch)
    command = ["nvcc", "-cubin", f"-arch={arch}", "-std=c++17", "-O3", "--expt-relaxed-constexpr"]
    command += ["-Xptxas=-v,--warn-on-spills", "--keep", f"--keep-dir={folder}"]
    command += [f"-I{include}" for include in extension_folders(ROOT)]
    command += [f"--output-file={folder / 'kernels.cubin'}", str(ROOT / f"csrc/cuda/{stem}.cu")]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return stem, done.stdout, (folder / f"{stem}.ptx").read_text()


def test_kernels_fit_in_registers_without_spills(compiled: tuple[str, str, str]):
    stem, said, _ = compiled
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert spills == [("0", "0", "0")] * KERNELS[stem]
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == KERNELS[stem]
    assert max(registers) <= MAX_REGISTERS_OF.get(stem, MAX_REGISTERS)


def test_rows_of_whole_vectors_are_moved_in_vectors(compiled: tuple[str, str, str]):
    stem, _, ptx = compiled
    kernels = re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, flags=re.DOTALL)
    assert len(kernels) == KERNELS[stem]
    for name, body in kernels:
        vectors = re.findall(r"(?:ld|st)\.global(?:\.\w+)*\.v[24]\.\w+", body)
        vectors += re.findall(r"cp\.async\.\w+\.shared\.global \[[^\]]+\], \[[^\]]+\], 16", body)
        halves = re.findall(r"(?:ld|st)\.global(?:\.\w+)*\.[bu]16", body)
        assert not re.search(r"\b(?:atom|red)\.", body), name  # sums have a fixed order
        if "finish_kernel" in name:
            assert not halves, name
        elif "Li1E" in name:  # the template argument kVector: one element at a time
            assert not vectors, name
        elif "optimizer_total" not in name:  # which adds one number a chunk
            assert vectors, name
            assert stem == "optimizer" or not halves, name
