"""Where Triton's kernels run: on the GPU, or under TRITON_INTERPRET=1 on the CPU, and slowly."""

from __future__ import annotations

import pytest
import torch

from dinov2_fast import environment


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
