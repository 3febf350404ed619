"""GELU's kernels for a GPU at DINOv2's widths, on packs of global and local crops."""

from __future__ import annotations

import pytest
import torch

from dinov2_fast.ops.gelu import gelu, gelu_backward_
from tests.ops.gpu.feed_forward import (
    DTYPES,
    assert_gradient_is_within_budget,
    assert_pack_is_within_budget,
)

pytestmark = pytest.mark.gpu

WIDTHS = [1536, 3072, 4096, 61]  # hidden widths of ViT-S, B, L; a prime


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pack_is_within_budget(
    width: int, dtype: torch.dtype, kernels: str, device_of_kernels: str, num_images: int
):
    assert_pack_is_within_budget(
        gelu, gelu_backward_, (width, width), dtype, kernels, device_of_kernels, num_images
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_autograd_is_within_budget(
    dtype: torch.dtype, kernels: str, device_of_kernels: str
):
    assert_gradient_is_within_budget(gelu, 2 * 96, dtype, kernels, device_of_kernels)
