"""GELU: the exact one, its gradient, and the backward pass in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_fast import native
from dinov2_fast.errors import BackendUnavailable
from dinov2_fast.ops.gelu import gelu, gelu_backward_, gelu_reference
from tests.inputs import COMPILERS, DTYPES, ROW_SHAPES, leaves, randn
from tests.tolerance import assert_within_error_budget

OPCHECK_WARNING = "ignore:The .grad attribute of a Tensor that is not a leaf"


def in_place(x: Tensor, da: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, activation and bias gradient of the in-place backward pass."""
    x, da = x.clone(), da.clone()
    sums = gelu_backward_(da, x, backend=backend)
    return x, da, sums


def plain(x: Tensor, da: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by autograd."""
    (leaf,) = leaves(x)
    a = gelu_reference(leaf)
    (dx,) = torch.autograd.grad(a, leaf, da)
    return dx, a.detach(), dx.sum(0)


def test_reference_known_values():
    x = torch.tensor([[0.0, 1.0, -1.0, 40.0, -40.0]], dtype=torch.float64)
    # Phi(1) = 0.8413447460685429
    expected = torch.tensor([[0.0, 0.8413447460685429, -0.1586552539314571, 40.0, 0.0]])
    torch.testing.assert_close(gelu_reference(x), expected.double(), rtol=1e-7, atol=1e-15)


@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(backend: str, dtype: torch.dtype, shape: tuple[int, int]):
    x = randn(*shape, dtype=dtype, scale=3.0)
    assert_within_error_budget(
        gelu(x, backend=backend),
        low_precision=gelu_reference(x),
        truth=gelu_reference(x.double()),
        name="gelu",
    )


@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_match_reference(backend: str, dtype: torch.dtype, shape: tuple[int, int]):
    x, da = randn(*shape, dtype=dtype, scale=3.0), randn(*shape, dtype=dtype, seed=1)

    def gradient(x: Tensor, function) -> Tensor:
        (leaf,) = leaves(x)
        return torch.autograd.grad(function(leaf), leaf, da.to(x.dtype))[0]

    assert_within_error_budget(
        gradient(x, lambda leaf: gelu(leaf, backend=backend)),
        low_precision=gradient(x, gelu_reference),
        truth=gradient(x.double(), gelu_reference),
        name="gelu.dx",
    )


@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_in_place_gives_gradient_activation_and_bias_gradient(backend, dtype, shape):
    x, da = randn(*shape, dtype=dtype, scale=3.0), randn(*shape, dtype=dtype, seed=1)

    found = in_place(x, da, backend)
    low, truth = plain(x, da), plain(x.double(), da.double())

    assert found[2].dtype == torch.float32
    found = (*found[:2], found[2].to(dtype))
    for name, out, low_precision, exact in zip(("dx", "a", "sums"), found, low, truth, strict=True):
        assert_within_error_budget(out, low_precision=low_precision, truth=exact, name=name)


def test_every_instruction_set_is_as_good(level: str):
    test_backward_in_place_gives_gradient_activation_and_bias_gradient(
        "native", torch.float32, (257, 384)
    )


def test_threads_change_no_bit(on_native: None):
    x, da = randn(500, 257, scale=2.0), randn(500, 257, seed=1)
    one = in_place(x, da, "native")
    torch.set_num_threads(3)
    try:
        three = in_place(x, da, "native")
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, one, three))


def test_far_out_values_are_the_limits(backend: str):
    x = torch.tensor([[-1e30, 1e30, -30.0, torch.nan]]).requires_grad_()
    a = gelu(x, backend=backend)
    (dx,) = torch.autograd.grad(a.sum(), x)
    assert a[0, :3].tolist() == [0.0, pytest.approx(1e30), pytest.approx(0.0)]
    assert dx[0, :3].tolist() == [0.0, 1.0, pytest.approx(0.0)]
    assert a.isnan()[0, 3]
    assert dx.isnan()[0, 3]


def test_gradcheck():
    (x,) = leaves(randn(3, 5), dtype=torch.float64)
    assert torch.autograd.gradcheck(gelu, (x,))


@pytest.mark.filterwarnings(OPCHECK_WARNING)
def test_opcheck(on_native: None):
    wide = randn(4, 9)
    for x in (wide[:, :6], wide[:, :6].clone().requires_grad_()):
        torch.library.opcheck(torch.ops.dinov2_fast.gelu.default, (x, "native"))
        arguments = (randn(4, 6, seed=1), x.detach(), "native")
        torch.library.opcheck(torch.ops.dinov2_fast.gelu_backward.default, arguments)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_fullgraph(backend: str, compiler: str):
    (x,) = leaves(randn(6, 10))

    def twice(x: Tensor) -> Tensor:
        return 2 * gelu(x, backend=backend)

    compiled = torch.compile(twice, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(x), twice(x))
    gradients = [torch.autograd.grad(run(x).sum(), x)[0] for run in (compiled, twice)]
    torch.testing.assert_close(*gradients)


def test_rejects_bad_input():
    with pytest.raises(ValueError, match=r"gelu: x must have shape \[R, F\], got \(2, 3, 4\)"):
        gelu(torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match="gelu: x must be of a floating-point type"):
        gelu(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"gelu_backward_: da must have shape \[2, 3\]"):
        gelu_backward_(torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="gelu_backward_: da must have the dtype of x"):
        gelu_backward_(torch.zeros(2, 3).double(), torch.zeros(2, 3))
    with pytest.raises(BackendUnavailable, match=r"adjacent columns|not built|float"):
        gelu(torch.zeros(3, 2).t(), backend="native")


def test_the_extension_itself_says_what_came():
    if native.why_not():
        pytest.skip(native.why_not())
    x, da, dx = torch.zeros(2, 3), torch.ones(2, 3), torch.full((2, 3), 7.0)
    good = {"da": da.data_ptr(), "x": x.data_ptr(), "dx": dx.data_ptr(), "activation": 0}
    good |= {"partials": 0, "rows": 2, "width": 3, "block_rows": 64, "da_row_stride": 3}
    good |= {"x_row_stride": 3, "dx_row_stride": 3, "activation_row_stride": 0}
    good |= {"dtype": "float32", "threads": 1, "level": "auto"}
    for change, message in [
        ({"rows": -1}, "rows must not be negative, got -1"),
        ({"width": -2}, "width must not be negative, got -2"),
        ({"block_rows": 0}, "block_rows must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"dx_row_stride": 2}, "dx: expected a row stride of at least 3 elements, got 2"),
    ]:
        with pytest.raises(ValueError, match=f"gelu_backward_cpu: {message}"):
            native.module().gelu_backward_cpu(**(good | change))
    assert torch.equal(dx, torch.full((2, 3), 7.0))
