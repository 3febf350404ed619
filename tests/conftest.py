"""Fixtures of every test: one thread, fixed seeds, and what this machine has: backends, devices."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from dinov2_fast import environment, native
from dinov2_fast.backends import PREFERENCE, availability
from tests.triton_interpreter import compute_as_a_gpu_does

if environment.triton_interpreted():
    compute_as_a_gpu_does()

LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


@pytest.fixture(scope="session", autouse=True)
def single_thread():
    """One thread: tiny tensors gain nothing from more, and sums keep their order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed that the global generators start every test with."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture
def on_native() -> None:
    """Skips where the extension is not built."""
    if native.why_not():
        pytest.skip(f"native: {native.why_not()}")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, on_native: None) -> str:
    """Every instruction set of this processor, in force for the native backend."""
    if request.param not in native.cpu_levels():
        pytest.skip(f"this processor has {', '.join(native.cpu_levels())}")
    monkeypatch.setenv("DINOV2_FAST_CPU_LEVEL", request.param)
    return request.param


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with `backend` and `device`, or with one of them, on everything there is.

    The op is the one that the file tests (test_<stem>.py). What it has no code for is left out,
    what this machine cannot run is skipped with the reason; `backend` alone means those of the CPU.
    """
    wants_device = "device" in metafunc.fixturenames
    if "backend" not in metafunc.fixturenames:
        if wants_device:
            metafunc.parametrize(
                "device", [pytest.param(d, marks=_marks(d)) for d in ("cpu", "cuda")]
            )
        return
    stem = metafunc.definition.path.stem.removeprefix("test_")
    if stem not in PREFERENCE:  # a part of an op: cross_entropy_prototypes
        stem = max((op for op in PREFERENCE if stem.startswith(f"{op}_")), key=len)
    names = ("device", "backend") if wants_device else ("backend",)
    parameters = []
    for device in ("cpu", "cuda") if wants_device else ("cpu",):
        reasons = availability(stem, device)
        # Triton is in no order of the CPU, but TRITON_INTERPRET=1 makes it run there.
        interpreted = ["triton"] if device == "cpu" and not reasons["triton"] else []
        for backend in [*PREFERENCE[stem][device], *interpreted]:
            marks = _marks(device, reasons[backend])
            values = (device, backend)[-len(names) :]
            parameters.append(pytest.param(*values, id=f"{backend}-{device}", marks=marks))
    metafunc.parametrize(names, parameters)


def _marks(device: str, reason: str = "") -> list[pytest.MarkDecorator]:
    """Marks of a test on a device type, given why a backend cannot run there."""
    if device == "cpu":
        return [pytest.mark.skip(reason=reason)] if reason else []
    if not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    return [pytest.mark.gpu] + ([pytest.mark.skip(reason=reason)] if reason else [])
