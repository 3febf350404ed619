"""SwiGLU's backward pass in place: gradient, activation and the gradient of the bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_fast.ops.swiglu import swiglu_backward_, swiglu_reference
from tests.inputs import DTYPES, leaves, randn
from tests.tolerance import assert_within_error_budget

SHAPES = [(257, 1024), (1, 1), (13, 61), (65, 17), (0, 8), (3, 0)]


def in_place(x12: Tensor, dh: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    x12, dh = x12.clone(), dh.clone()
    sums = swiglu_backward_(dh, x12, backend=backend)
    return x12, dh, sums


def by_autograd(x12: Tensor, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (leaf,) = leaves(x12)
    h = swiglu_reference(leaf)
    (dx12,) = torch.autograd.grad(h, leaf, dh)
    return dx12, h.detach(), dx12.sum(0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gives_gradient_activation_and_bias_gradient(backend, dtype, shape):
    rows, hidden = shape
    x12 = randn(rows, 2 * hidden, dtype=dtype, scale=3.0)
    dh = randn(rows, hidden, dtype=dtype, seed=1)

    *found, sums = in_place(x12, dh, backend)
    low, truth = by_autograd(x12, dh), by_autograd(x12.double(), dh.double())

    assert sums.dtype == torch.float32
    found.append(sums.to(dtype))
    for name, out, one, exact in zip(("dx12", "h", "sums"), found, low, truth, strict=True):
        assert_within_error_budget(out, low_precision=one, truth=exact, name=name)


def test_every_instruction_set_is_as_good(level):
    test_gives_gradient_activation_and_bias_gradient("native", torch.float32, (65, 129))


def test_threads_change_no_bit(on_native: None):
    x12, dh = randn(500, 2 * 129), randn(500, 129, seed=1)
    one = in_place(x12, dh, "native")
    torch.set_num_threads(3)
    try:
        three = in_place(x12, dh, "native")
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, one, three))


def test_rejects_bad_input():
    with pytest.raises(ValueError, match=r"swiglu_backward_: dh must have shape \[2, 3\]"):
        swiglu_backward_(torch.zeros(2, 4), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="swiglu_backward_: dh must have the dtype of x12"):
        swiglu_backward_(torch.zeros(2, 3).double(), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="swiglu_backward_: dh must be on cpu, got meta"):
        swiglu_backward_(torch.zeros(2, 3, device="meta"), torch.zeros(2, 6))
