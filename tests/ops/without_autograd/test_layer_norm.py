"""The layer norm's functions that a block's own backward is made of."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2_fast.ops.layer_norm import (
    can_rebuild,
    layer_norm_backward_,
    layer_norm_forward,
    layer_norm_reference,
)
from tests.inputs import ROW_SHAPES, leaves, randn, randperm
from tests.tolerance import assert_within_error_budget

# Types of the residual stream, and of what the branch works in.
TYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
]


def make_inputs(rows: int, channels: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Rows with a mean far from 0, as a residual stream has them; weight and bias near 1 and 0."""
    x = randn(rows, channels, dtype=dtype, device=device, scale=3.0) + 2
    weight = 1 + randn(channels, device=device, seed=1, scale=0.1)
    bias = randn(channels, device=device, seed=2, scale=0.1)
    return [x, weight, bias]


def raw_outputs(
    inputs: list[torch.Tensor],
    rows: torch.Tensor | None,
    dy: torch.Tensor,
    out_dtype: torch.dtype,
    *,
    save_normalised: bool,
    backend: str,
) -> list[torch.Tensor]:
    """y, dx added to ones, dweight and dbias of the functions without autograd."""
    x, weight, bias = inputs
    options = {"eps": 1e-6, "rows": rows, "out_dtype": out_dtype, "backend": backend}
    y, rstd = layer_norm_forward(x, weight, bias, **options)
    normalised = None
    if save_normalised:
        one, zero = torch.ones_like(weight), torch.zeros_like(bias)
        normalised, _ = layer_norm_forward(x, one, zero, **options)
    dx = torch.ones_like(x)
    dweight, dbias = layer_norm_backward_(
        dx, dy, y, rstd, weight, bias, rows=rows, normalised=normalised, backend=backend
    )
    return [y, dx, dweight, dbias]


@pytest.mark.parametrize("shape", ROW_SHAPES)
@pytest.mark.parametrize("types", TYPE_PAIRS, ids=str)
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("save_normalised", [False, True])
def test_forward_and_backward_without_autograd_match_reference(
    shape: tuple[int, int],
    types: tuple[torch.dtype, torch.dtype],
    with_rows: bool,
    save_normalised: bool,
    backend: str,
    device: str,
):
    x_dtype, out_dtype = types
    x, weight, bias = make_inputs(*shape, x_dtype, device)
    inputs = [x, weight, bias]
    rows = randperm(shape[0], device=device)[: shape[0] // 2 + 1] if with_rows else None
    num_rows = shape[0] if rows is None else rows.shape[0]
    dy = randn(num_rows, shape[1], dtype=out_dtype, device=device, seed=3)

    def outputs(inputs: list, dy: torch.Tensor, out_dtype: torch.dtype, backend: str) -> list:
        return raw_outputs(
            inputs, rows, dy, out_dtype, save_normalised=save_normalised, backend=backend
        )

    out = outputs(inputs, dy, out_dtype, backend)
    low_precision = outputs(inputs, dy, out_dtype, "reference")
    truth = outputs([t.double() for t in inputs], dy.double(), torch.float64, "reference")
    for name, *candidates in zip(("y", "dx", "dw", "db"), out, low_precision, truth, strict=True):
        assert_within_error_budget(
            candidates[0],
            low_precision=candidates[1],
            truth=candidates[2],
            name=f"layer_norm.{name}",
        )


def test_backward_without_autograd_adds_the_gradient_of_autograd(backend: str, device: str):
    inputs = make_inputs(33, 61, torch.float32, device)
    rows = randperm(33, device=device)[:20]
    dy = randn(20, 61, device=device, seed=3)
    x, weight, bias = leaves(*inputs, dtype=torch.float64)
    y = layer_norm_reference(x, weight, bias, eps=1e-6, rows=rows)
    truth = list(torch.autograd.grad(y, (x, weight, bias), dy.double()))
    truth[0] = truth[0] + 1  # what dx held before
    options = {"save_normalised": False}
    out = raw_outputs(inputs, rows, dy, torch.float32, **options, backend=backend)[1:]
    low = raw_outputs(inputs, rows, dy, torch.float32, **options, backend="reference")[1:]
    for a, b, c in zip(out, low, truth, strict=True):
        assert_within_error_budget(a, low_precision=b, truth=c, name="layer_norm")


def test_a_weight_of_zero_needs_the_normalised_input(backend: str, device: str):
    x, weight, bias = make_inputs(13, 61, torch.float32, device)
    assert can_rebuild(weight, bias)
    weight[3] = 0.0
    assert not can_rebuild(weight)
    dy = randn(13, 61, device=device, seed=3)
    options = {"save_normalised": True, "backend": backend}
    for tensor in raw_outputs([x, weight, bias], None, dy, torch.float32, **options):
        assert tensor.isfinite().all()


@pytest.mark.parametrize(
    ("weight", "bias", "expected"),
    [
        ([1.0, -0.01], None, True),
        ([1.0, 0.0099], None, False),
        ([0.0, 0.0], None, False),
        ([1.0, float("nan")], None, False),
        ([1.0, float("inf")], None, False),
        ([1.0, -0.5], [8.0, 4.0], True),
        ([1.0, -0.5], [8.0, 4.1], False),
    ],
)
def test_can_rebuild_known_values(weight: list, bias: list | None, expected: bool):
    assert (
        can_rebuild(torch.tensor(weight), None if bias is None else torch.tensor(bias)) == expected
    )


@pytest.mark.parametrize("types", TYPE_PAIRS, ids=str)
def test_every_instruction_set_is_within_budget_on_every_tail(
    level: str,
    types: tuple[torch.dtype, torch.dtype],
):
    for channels in range(2, 100):  # past four sums of 16, and one vector after them
        inputs = make_inputs(17, channels, types[0], "cpu")
        dy = randn(17, channels, dtype=types[1], seed=channels)
        options = {"save_normalised": False}
        out = raw_outputs(inputs, None, dy, types[1], **options, backend="native")
        low = raw_outputs(inputs, None, dy, types[1], **options, backend="reference")
        wide = [t.double() for t in inputs]
        truth = raw_outputs(wide, None, dy.double(), torch.float64, **options, backend="reference")
        for a, b, c in zip(out, low, truth, strict=True):
            assert_within_error_budget(a, low_precision=b, truth=c, name=f"layer_norm {channels}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [384, 389])  # 389: most rows begin at no vector; both: a tail
def test_many_rows_come_out_as_few_do(channels: int, dtype: torch.dtype, on_native: None):
    # In bf16 more than the MiB from which rows are written past caches; of 33 one has no partner.
    inputs = make_inputs(1501, channels, torch.float32, "cpu")
    inputs[0][7, 3], inputs[0][40, 5] = torch.nan, torch.inf
    dy = randn(1501, channels, dtype=dtype, seed=3)
    options = {"save_normalised": False, "backend": "native"}
    many = raw_outputs(inputs, None, dy, dtype, **options)
    few = [
        raw_outputs([x, *inputs[1:]], None, part, dtype, **options)
        for x, part in zip(inputs[0].split(33), dy.split(33), strict=True)
    ]
    for name, whole, parts in zip(("y", "dx"), many, zip(*few, strict=True), strict=False):
        assert torch.allclose(whole, torch.cat(parts), rtol=0, atol=0, equal_nan=True), name


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("channels", [384, 1030])  # the backward's rows in pairs, one by one
def test_result_does_not_depend_on_the_number_of_threads(
    channels: int, threads: int, on_native: None
):
    inputs = make_inputs(1031, channels, torch.float32, "cpu")  # 12 threads' worth and more; prime
    dy = randn(1031, channels, seed=3)
    options = {"save_normalised": False, "backend": "native"}
    expected = raw_outputs(inputs, None, dy, torch.float32, **options)
    try:
        torch.set_num_threads(threads)
        out = raw_outputs(inputs, None, dy, torch.float32, **options)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_a_call_of_the_kernels_allocates_and_computes_nothing_else(on_native: None):
    # A small torch op costs as much as a row of the kernel; each of these is an allocation.
    x, weight, bias = make_inputs(7, 16, torch.float32, "cpu")

    class Calls(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Calls():
        y, rstd = layer_norm_forward(x, weight, bias, eps=1e-6, backend="native")
        layer_norm_backward_(x, y, y, rstd, weight, bias, backend="native")
    forward, backward = (
        ["new_empty.default"] * 2,
        ["new_empty.default", *["empty_like.default"] * 2],
    )
    assert Calls.names == forward + backward


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dx": randn(5)}, ValueError, r"dx must have shape \[T, 8\]"),
        ({"dy": randn(2, 8)}, ValueError, r"dy must have shape \[3, 8\], got \(2, 8\)"),
        ({"y": randn(3, 7)}, ValueError, r"y must have shape \[3, 8\]"),
        ({"rstd": randn(2)}, ValueError, r"rstd must have shape \[3\]"),
        ({"bias": randn(7)}, ValueError, r"bias must have shape \[8\]"),
        ({"rows": torch.tensor([0, 5, 1])}, ValueError, r"rows must be in \[0, 5\)"),
        ({"normalised": randn(3, 7)}, ValueError, r"normalised must have shape \[3, 8\]"),
    ],
)
def test_backward_without_autograd_rejects_bad_input(
    changes: dict, error: type[Exception], message: str
):
    good = {"dx": randn(5, 8), "dy": randn(3, 8), "y": randn(3, 8), "rstd": torch.ones(3)}
    good |= {"weight": torch.ones(8), "bias": randn(8), "rows": torch.tensor([0, 4, 2])}
    layer_norm_backward_(**good)
    with pytest.raises(error, match=f"layer_norm_backward_: {message}"):
        layer_norm_backward_(**(good | changes))
