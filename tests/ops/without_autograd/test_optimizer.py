"""What only the native backend of the optimizer can get wrong."""

from __future__ import annotations

import math

import pytest
import torch

from dinov2_fast import native
from dinov2_fast.errors import BackendUnavailable
from dinov2_fast.ops.optimizer import adamw_ema_step, gradient_norm
from tests.inputs import randn
from tests.ops.test_optimizer import (
    NUMBERS,
    assert_bit_equal,
    copied,
    make_lists,
    reference_step,
)
from tests.tolerance import assert_within_error_budget

pytestmark = pytest.mark.usefixtures("on_native")

# Around one and several chunks of the kernels, and tails of every vector width.
SHAPES = [(16383,), (16384,), (16385,), (3, 16384), (5, 13109), (1,), (0,), (), (31,)]


@pytest.mark.parametrize("momentum", [0.2, 0.994])
@pytest.mark.parametrize("beta1", [0.3, 0.9])
def test_every_level_matches_the_reference(level: str, beta1: float, momentum: float):
    lists = make_lists(shapes=SHAPES)
    numbers = NUMBERS | {"step": 7, "beta1": beta1, "momentum": momentum}
    scaled = copied(lists)
    scaled["gradients"] = [0.5 * gradient for gradient in scaled["gradients"]]  # exact
    low_precision = reference_step(scaled, **numbers)
    truth = reference_step(copied(scaled, torch.float64), **numbers)
    adamw_ema_step(**lists, **numbers, gradient_scale=torch.tensor(0.5), backend="native")
    for name in lists.keys() - {"gradients"}:
        for index, tensor in enumerate(lists[name]):
            assert_within_error_budget(
                tensor,
                low_precision=low_precision[name][index],
                truth=truth[name][index],
                name=f"{level} {name}[{index}]",
            )


def test_every_level_sums_squares_in_float64(level: str):
    gradients = make_lists(shapes=SHAPES)["gradients"]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).double()
    norm = gradient_norm(gradients, backend="native")
    assert norm.item() == pytest.approx(flat.norm().item(), rel=1e-7)


@pytest.mark.parametrize(("value", "finite"), [(1e18, True), (1e19, False), (1e30, False)])
def test_norm_is_infinite_where_its_square_overflows_float32(value: float, finite: bool):
    # Whether a step is skipped must not depend on the backend.
    gradients = [torch.full((2, 3), value), torch.ones(2)]
    for backend in ("native", "reference"):
        assert bool(gradient_norm(gradients, backend=backend).isfinite()) == finite, backend


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, 16383, 16384, 13 * 13109 // 3])
def test_norm_shows_a_non_finite_value_anywhere(value: float, index: int, level: str):
    gradient = randn(5, 13109)
    gradient.view(-1)[index] = value
    assert not gradient_norm([randn(3), gradient], backend="native").isfinite(), level


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_result_does_not_depend_on_the_number_of_threads(threads: int):
    lists = make_lists(shapes=[*SHAPES, (384, 1536)])
    expected = copied(lists)
    norm = gradient_norm(lists["gradients"], backend="native")
    adamw_ema_step(**expected, **NUMBERS, gradient_scale=norm, backend="native")
    try:
        torch.set_num_threads(threads)
        assert torch.equal(gradient_norm(lists["gradients"], backend="native"), norm)
        adamw_ema_step(**lists, **NUMBERS, gradient_scale=norm, backend="native")
    finally:
        torch.set_num_threads(1)
    assert_bit_equal(lists, expected)


def test_autograd_sees_what_changed():
    lists = make_lists(shapes=[(3, 5)])
    versions = {name: tensors[0]._version for name, tensors in lists.items()}
    leaf = lists["parameters"][0].requires_grad_()
    loss = leaf.square().sum()
    adamw_ema_step(**lists, **NUMBERS, backend="native")
    for name, tensors in lists.items():
        assert (tensors[0]._version > versions[name]) == (name != "gradients"), name
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["parameters", "gradients", "exp_avg_sqs", "ema_parameters"])
def test_other_layouts_are_left_to_the_reference(name: str):
    lists = make_lists(shapes=[(3, 5), (7, 11)])
    lists[name][1] = lists[name][1].t().contiguous().t()
    expected = copied(lists)
    with pytest.raises(BackendUnavailable, match=rf"{name}\[1\] must be contiguous"):
        adamw_ema_step(**lists, **NUMBERS, backend="native")
    assert_bit_equal(lists, expected)
    adamw_ema_step(**lists, **NUMBERS)
    adamw_ema_step(**expected, **NUMBERS, backend="reference")
    assert_bit_equal(lists, expected)


def test_other_types_are_left_to_the_reference():
    gradients = [randn(3), randn(4).double()]
    with pytest.raises(BackendUnavailable, match=r"gradients\[1\] must be float32, got float64"):
        gradient_norm(gradients, backend="native")
    assert torch.equal(gradient_norm(gradients), gradient_norm(gradients, backend="reference"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": [-1]}, "sizes must not be negative, got -1"),
        ({"sizes": [3, 3]}, "tensors must hold 2 pointers, got 1"),
        ({"tensors": [0]}, "tensors must not be a null pointer"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"level": "sse9"}, "expected an instruction set of auto, baseline.*got 'sse9'"),
    ],
)
def test_the_extension_refuses_bad_arguments(changes: dict, message: str):
    x = randn(3)
    good = {"tensors": [x.data_ptr()], "sizes": [3], "threads": 1, "level": "auto"}
    with pytest.raises(ValueError, match=f"optimizer_norm_cpu: {message}"):
        native.module().optimizer_norm_cpu(**(good | changes))
