"""CUDA C++ -> PTX -> machine code by nvcc, kept by a hash of everything that was compiled."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

CACHE = Path(tempfile.gettempdir()) / f"simt-ptx-{os.getuid()}"
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr")


def compile_cu(
    path: str | Path,
    arch: str = "compute_80",
    *,
    include: Sequence[str | Path] = (),
    flags: Sequence[str] = (),
) -> str:
    """The PTX of a CUDA file; compiled once for the same preprocessed text and flags.

    Args:
        path: a .cu file.
        arch: compute_80, compute_90a, ...
        include: folders to search for headers.
        flags: more options of nvcc.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("simt: nvcc is not installed")
    folders = [f"-I{folder}" for folder in include]
    options = [*FLAGS, f"-arch={arch}", *flags, *folders]
    text = _run([nvcc, "-E", *options, str(path)])
    key = hashlib.sha256("\n".join([*options, text]).encode()).hexdigest()[:32]
    kept = CACHE / f"{key}.ptx"
    if not kept.exists():
        CACHE.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            fresh = Path(folder) / "fresh.ptx"
            _run([nvcc, "-ptx", *options, "-o", str(fresh), str(path)])
            fresh.replace(kept)
    return kept.read_text()


def assemble(ptx: str, arch: str = "sm_80") -> tuple[Path, str]:
    """Machine code of a PTX text, and what ptxas says of it; kept by a hash of the text.

    Args:
        ptx: as compile_cu returns it; the version of the compiler stands in it.
        arch: sm_80, sm_90a, ...
    Returns:
        A cubin, and the lines of `ptxas -v`.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("simt: nvcc is not installed")
    key = hashlib.sha256(f"{arch}\n{ptx}".encode()).hexdigest()[:32]
    cubin, said = CACHE / f"{key}.cubin", CACHE / f"{key}.txt"
    if not said.exists():
        CACHE.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            source, fresh = Path(folder) / "fresh.ptx", Path(folder) / "fresh.cubin"
            source.write_text(ptx)
            command = [nvcc, "-cubin", f"-arch={arch}", "-O3", "-Xptxas=-v"]
            words = Path(folder) / "fresh.txt"
            words.write_text(_run([*command, "-o", str(fresh), str(source)]))
            fresh.replace(cubin)
            words.replace(said)  # last: it says that both are there
    return cubin, said.read_text()


def extension_folders(root: Path) -> list[str]:
    """Where the headers of our own kernels are: csrc, pybind11, Python."""
    import pybind11

    return [str(root / "csrc"), pybind11.get_include(), sysconfig.get_path("include")]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"simt: {' '.join(command)}\n{done.stderr}")
    return done.stdout + done.stderr
