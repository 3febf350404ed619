"""What nvcc says of the CUDA kernels: registers, spills and the width of their accesses."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tools.simt.compile import extension_folders

ROOT = Path(__file__).parents[2]
# Kernels of a file. Types of one op: 3; of stream and branch: 7; each in vectors and in elements.
# Attention: 3 forwards, 2 short backwards, and 2 kernels for each of two long ones.
# Second passes, which put together what CTAs have summed, are of one type and one form.
# KoLeo's search has two tiles; the optimizer's kernels choose a width for every tensor.
KERNELS = {
    "attention": 2 * (3 + 2 + 2 + 2),
    "cross_entropy": 2 * 3 * 2 + 1,
    "gelu": 2 * 3 * 2,
    "koleo": (3 + 2) * 2,
    "layer_norm": 2 * 7 * 2,
    "sinkhorn": 2 * 3 * 2 + 2,
    "optimizer": 4,
    "stochastic_depth": 2 * 7 * 2,
    "swiglu": 2 * 3 * 2,
}
# 65536 registers of an SM / (2048 resident threads / 2): half occupancy hides the memory's latency.
MAX_REGISTERS = 64
# Attention lives on what it holds in registers: all that two CTAs of 4 warps may have. KoLeo's
# search hides latency by independent products in registers, not by more threads.
MAX_REGISTERS_OF = {"attention": 255, "koleo": 128}
# Bytes of static shared memory: all CTAs that half occupancy means have theirs of the 164 KiB that
# an SM of an A100 gives, and its L1 cache keeps most of the rest.
MAX_SHARED = 9216
MAX_SHARED_OF = {"koleo": 37_888}
# HMMA of 4096 FLOPs that 32 rows take: with the 64 columns of a tile, or the 16 of a step.
PRODUCTS = {
    # Twice: a tile that is full and one that need not be.
    "attention_forward_kernel": 2 * 2 * 32 * 64 * 64 * 2 // 4096,
    # The same; 8 keys left; 32 keys, and those left, of 16 rows: the queries left.
    "attention_forward_resident_kernel": 2 * 128 + 24 + 32 + 12,
    "attention_backward_queries_kernel": 3 * 32 * 16 * 64 * 2 // 4096,
    "attention_backward_keys_kernel": 4 * 32 * 16 * 64 * 2 // 4096,
    # A step of the keys, and three of dQ: two in a row and one alone, 32 rows by 16 channels.
    r"attention_backward_resident_kernel\w+Li2E": 64 + 3 * 4,
    # And 8 keys more: scores and dP by halves of a product, dV or dK, dQ.
    r"attention_backward_resident_kernel\w+Li8ELb0E": 64 + 3 * 4 + 2 * 4 + 1 + 4,
    r"attention_backward_resident_kernel\w+Li8ELb1E": 64 + 3 * 4,
    "attention_backward_round_queries_kernel": 0,
}

pytest.importorskip("pybind11")
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


COMPILED = [
    pytest.param(
        (stem, arch), marks=[] if arch == "sm_80" else [pytest.mark.slow], id=f"{stem}-{arch}"
    )
    for stem in KERNELS
    for arch in ("sm_80", "sm_90")
]


@pytest.fixture(scope="module", params=COMPILED)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A file's stem, what ptxas says about its kernels, and the folder with their PTX and cubin."""
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
    return stem, done.stdout, folder


def test_kernels_fit_in_registers_without_spills(compiled: tuple[str, str, Path]):
    stem, said, _ = compiled
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert spills == [("0", "0", "0")] * KERNELS[stem]
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == KERNELS[stem]
    assert max(registers) <= MAX_REGISTERS_OF.get(stem, MAX_REGISTERS)
    shared = [int(count) for count in re.findall(r"(\d+) bytes smem", said)]
    assert max(shared, default=0) <= MAX_SHARED_OF.get(stem, MAX_SHARED)


def test_rows_of_whole_vectors_are_moved_in_vectors(compiled: tuple[str, str, Path]):
    stem, _, folder = compiled
    ptx = (folder / f"{stem}.ptx").read_text()
    kernels = re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, flags=re.DOTALL)
    assert len(kernels) == KERNELS[stem]
    for name, body in kernels:
        vectors = re.findall(r"(?:ld|st)\.global(?:\.\w+)*\.v[24]\.\w+", body)
        vectors += re.findall(r"cp\.async\.\w+\.shared\.global \[[^\]]+\], \[[^\]]+\], 16", body)
        halves = re.findall(r"(?:ld|st)\.global(?:\.\w+)*\.[bu]16", body)
        added = re.findall(r"\b(?:atom|red)\.", body)
        assert bool(added) == adds_in_any_order(name), name
        if "finish_kernel" in name:
            assert not halves, name
        elif "Li1E" in name:  # the template argument kVector: one element at a time
            assert not vectors, name
        elif not re.search("optimizer_(total|table)", name):  # which move single numbers
            assert vectors, name
            assert stem == "optimizer" or not halves, name


def adds_in_any_order(name: str) -> bool:
    """Whether a kernel shares sums with others at once; all else is summed in a fixed order."""
    return bool(re.search(r"resident_kernel\w+Li8ELb1E", name))


def opcodes_of(folder: Path) -> dict[str, Counter[str]]:
    """How often each opcode stands in the machine code of each kernel."""
    triton = pytest.importorskip("triton")
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(folder / "kernels.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    opcode = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)")
    kernels = said.split("Function : ")[1:]
    return {text.split()[0]: Counter(opcode.findall(text)) for text in kernels}


def test_machine_code_spills_nothing_and_adds_in_order(compiled: tuple[str, str, Path]):
    stem, _, folder = compiled
    kernels = opcodes_of(folder)
    assert len(kernels) == KERNELS[stem]
    for name, ops in kernels.items():
        for op in ops:
            assert not re.match(r"LDL|STL|ATOM", op), (name, op)  # spills
            assert adds_in_any_order(name) or not re.match(r"RED\b", op), (name, op)
        wide = any(re.match(r"LDG.*\.128|LDGSTS.*\.128", op) for op in ops)
        assert wide or re.search("Li1E|finish_kernel|optimizer_(total|table)", name), name


@pytest.mark.parametrize("compiled", COMPILED[:2], indirect=True, scope="module")
def test_attention_is_all_products_and_vectors_in_machine_code(compiled: tuple[str, str, Path]):
    stem, _, folder = compiled
    kernels = opcodes_of(folder)
    assert len(kernels) == KERNELS[stem]
    for name, ops in kernels.items():
        products = next(count for kernel, count in PRODUCTS.items() if re.search(kernel, name))
        # None is left out, done in halves, or stands twice: a loop that ptxas has taken apart.
        found = sum(n for op, n in ops.items() if op.startswith("HMMA.16816.F32"))
        assert found == products, name
        for op in ops:
            if re.match(r"LDG\.|STG\.|LDGSTS", op):  # rows in 16 bytes; lse, delta, offsets in 4
                assert "128" in op or op in {"LDG.E", "LDG.E.CONSTANT", "STG.E", "LDGSTS.E"}, name
        copied = any(op.startswith("LDGSTS.E.BYPASS") and op.endswith(".128") for op in ops)
        assert copied or "round_queries" in name, name
        assert any(op.startswith("STG.E.128") for op in ops), name
