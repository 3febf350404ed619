"""The optimizer's kernels for a GPU, on the parameters of a ViT-S and a head's last layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dinov2_fast.ops.optimizer import adamw_ema_step, clip_coefficient, gradient_norm
from tests.ops.test_optimizer import Lists, make_lists
from tests.tolerance import assert_within_error_budget

pytestmark = pytest.mark.gpu

# Vectors between matrices, as one block has them; a scalar, primes and an empty tensor.
SHAPES = [(384,), (384, 384), (1152,), (), (31, 61), (0, 7)]
LARGE = [(1152, 384), (1536, 384), (65536, 256)]  # too much for an interpreter
NUMBERS: dict[str, Any] = {
    "lr": 1e-3,
    "weight_decay": 0.04,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "step": 7,
    "momentum": 0.992,
}


@pytest.fixture
def lists(device_of_kernels: str) -> Lists:
    """State as after some steps."""
    shapes = [*SHAPES, *LARGE] if device_of_kernels == "cuda" else SHAPES
    return make_lists(device=device_of_kernels, shapes=shapes)


def stepped(lists: Lists, backend: str, dtype: torch.dtype = torch.float32) -> Lists:
    """Clipped as training does, without waiting for the norm; and copies in bfloat16."""
    after = {name: [x.to(dtype, copy=True) for x in tensors] for name, tensors in lists.items()}
    norm = gradient_norm(after["gradients"], backend=backend)
    after["copies"] = [torch.empty_like(x, dtype=torch.bfloat16) for x in after["parameters"]]
    scale = clip_coefficient(norm, 3.0)
    skip = norm.isfinite().logical_not()
    adamw_ema_step(**after, **NUMBERS, gradient_scale=scale, skip=skip, backend=backend)
    return after | {"norm": [norm]}


def test_a_clipped_step_is_within_budget(kernels: str, lists: Lists):
    found, low = (stepped(lists, backend) for backend in (kernels, "reference"))
    truth = stepped(lists, "reference", torch.float64)
    for one, source in zip(found.pop("copies"), found["parameters"], strict=True):
        assert torch.equal(one, source.bfloat16())
    for name, tensors in found.items():
        for index, tensor in enumerate(tensors):
            assert_within_error_budget(
                tensor,
                low_precision=low[name][index],
                truth=truth[name][index],
                name=f"{name}[{index}]",
            )
    again = stepped(lists, kernels)
    for name, tensors in found.items():
        assert all(map(torch.equal, tensors, again[name]))  # sums have one order


def test_a_step_with_nan_changes_nothing(kernels: str, lists: Lists):
    lists["gradients"][1][5, 7] = torch.nan
    after = stepped(lists, kernels)
    assert after["norm"][0].isnan()
    for name in ("parameters", "exp_avgs", "exp_avg_sqs", "ema_parameters"):
        assert all(map(torch.equal, after[name], lists[name]))
