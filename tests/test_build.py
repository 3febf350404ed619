from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import dinov2_fast
from dinov2_fast import native

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def needed_libraries(path: Path) -> list[str]:
    """Names of the shared libraries that the dynamic loader must find for a file."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    return re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", path))


def configure(folder: Path, **environment: str) -> str:
    """What CMake says while it configures the build, on lines about this project."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    pybind11 = pytest.importorskip("pybind11")
    text = run(
        "cmake",
        "-S",
        ROOT,
        "-B",
        folder,
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        **environment,
    )
    return "\n".join(line for line in text.splitlines() if "dinov2_fast:" in line)


@pytest.fixture
def extension() -> Path:
    if native.why_not():
        pytest.skip(f"native: {native.why_not()}")
    return Path(native.module().__file__)


def test_extension_needs_neither_torch_nor_a_cuda_runtime(extension: Path):
    needed = needed_libraries(extension)
    assert any(name.startswith("libc.so") for name in needed)
    assert not [n for n in needed if re.match(r"lib(torch|c10|cud|cublas|nv|python)", n)]


def test_extension_exports_its_entry_point_alone(extension: Path):
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    text = run("nm", "--dynamic", "--defined-only", "--format=posix", extension)
    assert [line.split()[0] for line in text.splitlines()] == ["PyInit__native"]


def test_extension_is_of_this_version(extension: Path):
    assert native.version() == dinov2_fast.__version__


def test_forcing_the_cpu_build_is_said_in_one_line(tmp_path: Path):
    said = configure(tmp_path, DINOV2_FAST_BUILD="cpu")
    assert said == "-- dinov2_fast: DINOV2_FAST_BUILD=cpu, building the CPU part only"
    assert not list(tmp_path.rglob("CMakeCUDACompiler.cmake"))


def test_without_nvcc_the_build_degrades_in_one_line(tmp_path: Path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("cmake", "c++", "g++", "gcc", "cc", "make", "ninja", "ld", "as", "ar", "sh"):
        found = shutil.which(name)
        if found is not None:
            (tools / name).symlink_to(found)
    said = configure(tmp_path / "build", PATH=str(tools), CUDACXX="")
    assert said == "-- dinov2_fast: no working nvcc found, building the CPU part only"


def test_a_misspelt_build_kind_stops_the_build(tmp_path: Path):
    with pytest.raises(AssertionError, match=r"expected auto, cpu or cuda, got 'gpu'"):
        configure(tmp_path, DINOV2_FAST_BUILD="gpu")


ARCHITECTURES = ROOT / "csrc" / "cuda" / "architectures.cmake"


def architectures(folder: Path, wanted: str) -> str:
    """What CMake makes of DINOV2_FAST_CUDA_ARCHS."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    script = folder / "architectures.cmake"
    script.write_text(f'include({ARCHITECTURES})\nmessage(STATUS "${{cuda_archs}}")\n')
    said = run("cmake", "-P", script, DINOV2_FAST_CUDA_ARCHS=wanted)
    return said.removeprefix("-- ").strip()


@pytest.mark.parametrize(
    ("wanted", "compiled"),
    [
        ("", "80-real;90-real;90-virtual"),
        ("80", "80-real;80-virtual"),
        ("90;80", "90-real;80-real;90-virtual"),
        ("80;100;90", "80-real;100-real;90-real;100-virtual"),
        # Code for one chip alone serves no later GPU, its PTX neither.
        ("80;90a", "80-real;90a;80-virtual"),
        ("90a", "90a"),
        # Forms that are spelt out are taken at their word.
        ("80;90-real", "80-real;90-real;80-virtual"),
        ("80-real", "80-real"),
        ("80-virtual;90", "80-virtual;90-real;90-virtual"),
        ("80;90-virtual", "80-real;90-virtual"),
    ],
)
def test_later_gpus_get_ptx_of_the_newest_architecture(wanted: str, compiled: str, tmp_path: Path):
    assert architectures(tmp_path, wanted) == compiled


@pytest.mark.parametrize("wanted", ["75", "80 90", "80,90", "8.0", "native", "sm_80"])
def test_architectures_that_cannot_be_built_stop_the_build(wanted: str, tmp_path: Path):
    with pytest.raises(AssertionError, match=r"expected 80 and later numbers"):
        architectures(tmp_path, wanted)


@pytest.mark.slow
def test_architectures_can_be_narrowed(tmp_path: Path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    options = {"CMAKE_EXPORT_COMPILE_COMMANDS": "ON", "DINOV2_FAST_CUDA_ARCHS": "80;90a"}
    said = configure(tmp_path, **options)
    assert said == "-- dinov2_fast: building the CPU part and CUDA code for 80-real 90a 80-virtual"
    commands = (tmp_path / "compile_commands.json").read_text()
    for code in ("80,code=[sm_80]", "80,code=[compute_80]", "90a,code=[compute_90a,sm_90a]"):
        assert f"arch=compute_{code}" in commands


@pytest.mark.slow
@pytest.mark.parametrize("stem", sorted(path.stem for path in ROOT.glob("csrc/cpu/*.cpp")))
def test_cpu_kernels_are_code_for_aarch64_too(stem: str):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("aarch64-linux-gnu-g++ is not installed")
    pybind11 = pytest.importorskip("pybind11")
    # This Python's headers serve: C's types have the same sizes on both systems.
    folders = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fopenmp", "-fsyntax-only"]
    run(compiler, *flags, *(f"-I{folder}" for folder in folders), ROOT / f"csrc/cpu/{stem}.cpp")


def test_ci_runs_the_command_of_the_readme():
    text = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "set -euo pipefail" in text
    assert "make test" in text
    assert "make test" in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sdist_builds_a_wheel_that_works_elsewhere(tmp_path: Path):
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are not installed")
    pytest.importorskip("scikit_build_core")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "*.egg-info")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    hook = "from scikit_build_core.setuptools import build_meta as b; print(b.build_{}('{}'))"
    run(sys.executable, "-c", hook.format("sdist", tmp_path), cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for name in ("csrc/bind.cpp", "csrc/cuda/swiglu.cu", "dinov2_fast/kernels/__init__.py"):
        assert (unpacked / name).is_file()
    run(
        sys.executable,
        "-c",
        hook.format("wheel", tmp_path),
        cwd=unpacked,
        DINOV2_FAST_BUILD="cpu",
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    tops = {name.split("/")[0] for name in names}
    assert tops == {"dinov2_fast", f"dinov2_fast-{dinov2_fast.__version__}.dist-info"}
    assert "dinov2_fast/py.typed" in names
    assert "dinov2_fast/kernels/__init__.py" in names
    configs = {f"dinov2_fast/configs/{p.name}" for p in ROOT.glob("dinov2_fast/configs/*.yaml")}
    assert configs <= set(names)
    code = (
        "import dinov2_fast, torch; from dinov2_fast.ops.swiglu import swiglu;"
        "print(dinov2_fast.__file__, swiglu(torch.ones(1, 2), backend='native').item())"
    )
    said = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert str(tmp_path / "installed") in said
    assert "0.731" in said  # silu(1) * 1
