"""Where kernels for a GPU run: there, or Triton's under TRITON_INTERPRET=1 on the CPU, slowly."""

from __future__ import annotations

import pytest
import torch

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
    if reason and device_of_kernels == "cpu" and request.param == "triton":
        reason += "; TRITON_INTERPRET=1 would run this on the CPU"
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def num_images(device_of_kernels: str) -> int:
    """Images of a pack of two global and eight local crops each: fewer where it takes long."""
    return 8 if device_of_kernels == "cuda" else 0
