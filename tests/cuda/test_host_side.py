"""What stands between an op and its CUDA kernels: device, stream, refusals, code in the file."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
import subprocess
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dinov2_fast.kernels
from dinov2_fast import backends, environment, native
from dinov2_fast.ops import _native_cuda, _optimizer_triton
from tests.cuda import native_on_ptx
from tests.cuda.captured import WAITING
from tests.source_files import ROOT
from tools.kernel_report.__main__ import CASES
from tools.kernel_report.cases import as_it_is

CUDA = ROOT / "csrc" / "cuda"
HERE = Path(__file__).parent / "fake_runtime"
LAUNCHED = "launch (2 1{1} 1) (32 1 1) {0} bytes, argument 7, stream 0x5eed, device {1}"
FAILED = "example: as the test wants"

needs_cuda = pytest.mark.skipif(not native.cuda_archs(), reason="no extension with CUDA")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """guard.cuh and launch.cuh in a program whose CUDA runtime prints what it is told."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    path = tmp_path_factory.mktemp("host") / "launches"
    folders = [f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    command = [compiler, "-std=c++17", *folders, str(HERE / "launches.cpp"), "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return path


@pytest.mark.parametrize(
    ("wanted", "shared_bytes", "failing", "expected"),
    [
        (0, 64, "", [LAUNCHED.format(64, 0)]),
        (1, 64, "", ["set device 1", LAUNCHED.format(64, 1), "set device 0"]),
        # What every kernel may have, and one byte more.
        (0, 49152, "", [LAUNCHED.format(49152, 0)]),
        (0, 49153, "", ["allow 49153 bytes", LAUNCHED.format(49153, 0)]),
        (0, 49153, "allow", ["allow 49153 bytes", FAILED]),
        (1, 64, "get device", [FAILED]),
        (1, 64, "set device", ["set device 1", FAILED]),
        (1, 64, "get attribute", ["set device 1", "set device 0", FAILED]),
        (1, 64, "launch", ["set device 1", LAUNCHED.format(64, 1), "set device 0", FAILED]),
        (1, 64, "last error", ["set device 1", LAUNCHED.format(64, 1), "set device 0", FAILED]),
        (1, 64, "refusal", ["set device 1", "set device 0", "example: refused"]),
    ],
)
def test_a_launch_is_on_its_device_and_stream_and_leaves_the_callers_device(
    program: Path, wanted: int, shared_bytes: int, failing: str, expected: list[str]
):
    command = [str(program), str(wanted), str(shared_bytes), failing]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [*expected, "device 0"]


def test_a_function_is_told_the_device_of_its_tensors_and_that_devices_stream(
    monkeypatch: pytest.MonkeyPatch,
):
    told: list[dict[str, Any]] = []
    extension = SimpleNamespace(example_cuda=lambda **arguments: told.append(arguments))
    monkeypatch.setattr(native, "module", lambda: extension)
    streams = {3: SimpleNamespace(cuda_stream=0x5EED), 0: SimpleNamespace(cuda_stream=0xBAD)}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[device.index])
    # Of a tensor on the fourth GPU `call` asks for nothing but where it is.
    tensor = SimpleNamespace(device=torch.device("cuda", 3))
    _native_cuda.call("example_cuda", {"rows": 2, "x": 64}, {"x": tensor}, ())
    assert told == [{"rows": 2, "x": 64, "device": 3, "stream": 0x5EED}]


def test_host_code_calls_nothing_that_allocates_or_waits():
    sources = {path: path.read_text() for path in CUDA.rglob("*.cu*")}
    calls = re.compile(r"\bcu(?:da)?[A-Z]\w*(?=\()")
    called = {name for text in sources.values() for name in calls.findall(text)}
    assert "cudaLaunchKernel" in called
    assert called <= {
        "cudaDeviceGetAttribute",
        "cudaFuncSetAttribute",
        "cudaGetDevice",
        "cudaGetErrorString",
        "cudaGetLastError",
        "cudaLaunchKernel",
        "cudaSetDevice",
    }
    assert not [path for path, text in sources.items() if "<<<" in text]  # past launch.cuh


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Native ops compute with CUDA kernels, which find no driver; names of what was called."""
    if not native.cuda_archs() or torch.cuda.is_available():
        pytest.skip("needs an extension with CUDA, and no driver")
    called: list[str] = []

    def call(name: str, plain: Any, tensors: Any, reached: Any) -> None:
        del tensors, reached
        called.append(name)
        with pytest.raises(RuntimeError, match=f"^{name}: .*CUDA"):
            getattr(native.module(), name)(**plain, device=0, stream=0)

    monkeypatch.setattr(native, "cuda_on_cpu", True)
    monkeypatch.setattr(_native_cuda, "call", call)
    backends._why_not.cache_clear()
    yield called
    backends._why_not.cache_clear()


@pytest.mark.parametrize("stem", CASES)
def test_without_a_driver_every_function_says_so(stem: str, launched: list[str]):
    case = CASES[stem][-1]
    list(case.run(case.sizes, case.types, as_it_is, "native"))
    assert len(set(launched)) == (3 if stem == "optimizer" else 2)  # its table is one more


@pytest.mark.parametrize(
    ("archs", "gpu", "message"),
    [
        ((), (8, 0), r"the extension was built without CUDA"),
        (("80-real",), None, r"torch sees no CUDA device"),
        (
            ("80-real", "90-real", "90-virtual"),
            (7, 5),
            r"holds code for 80-real, 90-real, 90-virtual, the GPU is 75; "
            r"its CUDA kernels need 80 or later",
        ),
        (
            ("90a",),
            (8, 0),
            r"holds code for 90a, the GPU is 80; rebuild with DINOV2_FAST_CUDA_ARCHS=80",
        ),
        (("80-real", "90-real", "90-virtual"), (12, 0), r"^$"),
        (("80-real", "90a", "80-virtual"), (10, 0), r"^$"),
    ],
)
def test_only_a_gpu_without_code_is_refused_before_a_launch(
    archs: tuple[str, ...],
    gpu: tuple[int, int] | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(native, "cuda_archs", lambda: archs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    assert re.search(message, native.why_not_for("gelu", "cuda"))


@needs_cuda
def test_an_op_without_kernels_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "cuda_on_cpu", True)
    assert not native.why_not_for("gelu", "cuda")
    assert native.why_not_for("example", "cuda") == "the extension has no cuda kernel for example"


@needs_cuda
def test_machine_code_and_code_for_later_gpus_are_in_the_extension():
    triton = pytest.importorskip("triton")
    file = Path(native.module().__file__)
    command = [triton.knobs.nvidia.cuobjdump.path, "-lelf", "-lptx", str(file)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for arch in native.cuda_archs():
        number, _, form = arch.partition("-")
        for kind, ending in (("real", "cubin"), ("virtual", "ptx")):
            if form in (kind, ""):
                held = re.findall(rf"\.sm_{number}\.{ending}$", said, flags=re.MULTILINE)
                assert len(held) == len(native_on_ptx.SOURCES), (arch, said)
    # PTX alone runs on a GPU that is newer than all of the machine code.
    assert not native.cuda_archs()[-1].endswith("-real")
    assert file.stat().st_size <= 15 * 2**20


class Waiting(TorchDispatchMode):
    """Notes what an op of ours does that waits for its GPU or copies to it from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        callers = [frame.f_code for frame, _ in traceback.walk_stack(None)]
        inside = any("dinov2_fast/ops/" in code.co_filename for code in callers)
        # Row numbers are looked at on the CPU alone.
        checks = any(code.co_name == "check_row_range" for code in callers)
        if inside and not checks and func.overloadpacket.__name__.startswith(WAITING):
            self.found.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stem", CASES)
def test_ops_wait_for_nothing_and_copy_nothing_from_the_host(stem: str, launched: list[str]):
    case = CASES[stem][-1]
    with Waiting() as waiting:
        list(case.run(case.sizes, case.types, as_it_is, "native"))
    assert launched
    assert not waiting.found


@pytest.fixture
def launched_by_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Triton's launches compute nothing, and all goes into a graph; names of their kernels."""
    pytest.importorskip("triton")
    if environment.triton_interpreted():
        pytest.skip("Triton interprets")
    from triton.runtime.jit import JITFunction

    for module in pkgutil.iter_modules(dinov2_fast.kernels.__path__):
        importlib.import_module(f"dinov2_fast.kernels.{module.name}")
    called: list[str] = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *_, **__: called.append(kernel.__name__))
    monkeypatch.setattr(_optimizer_triton, "_is_captured", lambda table: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # now the ops take tensors of the CPU
    backends._why_not.cache_clear()
    yield called
    backends._why_not.cache_clear()


@pytest.mark.parametrize("stem", CASES)
def test_tritons_launches_wait_for_nothing_either(stem: str, launched_by_triton: list[str]):
    case = CASES[stem][-1]
    types = [torch.float32 if stem == "optimizer" else kind for kind in case.types]
    with Waiting() as waiting:
        list(case.run(case.sizes, tuple(types), as_it_is, "triton"))
    assert len(launched_by_triton) >= 2
    assert not waiting.found
