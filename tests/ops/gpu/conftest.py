"""Where kernels for a GPU run: there, or Triton's under TRITON_INTERPRET=1 on the CPU, slowly."""

from __future__ import annotations

import pytest
import torch

from dinov2_fast import environment
from dinov2_fast.backends import PREFERENCE, availability


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with `kernels` on every backend with kernels of its op for a GPU."""
    if "kernels" in metafunc.fixturenames:
        order = PREFERENCE[metafunc.definition.path.stem.removeprefix("test_")]["cuda"]
        names = [name for name in order if name != "reference"]
        metafunc.parametrize("kernels", names, indirect=True)


@pytest.fixture
def device_of_kernels() -> str:
    """The device type that `kernels` run on here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(request: pytest.FixtureRequest, device_of_kernels: str) -> str:
    """A backend with kernels for a GPU."""
    stem = request.path.stem.removeprefix("test_")
    reason = availability(stem, device_of_kernels)[request.param]
    if request.param == "native" and device_of_kernels == "cpu":
        reason = "those of the CPU have tests of their own"
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def triton_device() -> str:
    """The device type that Triton's kernels run on here."""
    pytest.importorskip("triton")
    if environment.triton_interpreted():
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device; TRITON_INTERPRET=1 would run this on the CPU")
    return "cuda"


@pytest.fixture
def num_images(triton_device: str) -> int:
    """Images of a pack of two global and eight local crops each: fewer where it takes long."""
    return 8 if triton_device == "cuda" else 0
