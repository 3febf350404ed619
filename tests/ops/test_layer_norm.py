from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dinov2_fast import environment, native
from dinov2_fast.errors import BackendUnavailable
from dinov2_fast.ops.layer_norm import layer_norm, layer_norm_reference
from tests.inputs import COMPILERS, DTYPES, ROW_SHAPES, leaves, randn, randperm
from tests.tolerance import assert_within_error_budget

# opcheck itself looks at .grad of tensors that are not leaves.
OPCHECK_WARNING = "ignore:The .grad attribute of a Tensor that is not a leaf"


def make_inputs(
    rows: int,
    channels: int,
    dtype: torch.dtype,
    device: str,
    weight_dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """Rows with a mean far from 0, as a residual stream has them; weight and bias near 1 and 0."""
    x = randn(rows, channels, dtype=dtype, device=device, scale=3.0) + 2
    weight = 1 + randn(channels, device=device, seed=1, scale=0.1)
    bias = randn(channels, device=device, seed=2, scale=0.1)
    return [x, weight.to(weight_dtype or dtype), bias.to(weight_dtype or dtype)]


def test_reference_known_values():
    # Mean 2, variance 1: (-1, 1), times the weight, plus the bias. The second row is constant.
    x = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    weight, bias = torch.tensor([2.0, 3.0]), torch.tensor([10.0, 20.0])
    out = layer_norm_reference(x, weight, bias, eps=1e-12)
    torch.testing.assert_close(out, torch.tensor([[8.0, 23.0], [10.0, 20.0]]))
    # eps 3 makes the first row's deviation sqrt(1 + 3) = 2.
    out = layer_norm_reference(x, weight, bias, eps=3.0)
    torch.testing.assert_close(out, torch.tensor([[9.0, 21.5], [10.0, 20.0]]))
    out = layer_norm_reference(x, weight, bias, eps=1e-12, rows=torch.tensor([1, 0, 0]))
    torch.testing.assert_close(out, torch.tensor([[10.0, 20.0], [8.0, 23.0], [8.0, 23.0]]))


def test_float32_weights_round_bfloat16_rows_once(backend: str, device: str):
    x, weight, bias = make_inputs(13, 61, torch.bfloat16, device, torch.float32)
    low_precision = F.layer_norm(x.float(), (61,), weight, bias, 1e-6).bfloat16()
    truth = F.layer_norm(x.double(), (61,), weight.double(), bias.double(), 1e-6)
    out = layer_norm(x, weight, bias, backend=backend)
    assert_within_error_budget(out, low_precision=low_precision, truth=truth, name="layer_norm")


@pytest.mark.parametrize("shape", ROW_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("with_rows", [False, True])
def test_matches_reference(
    shape: tuple[int, int],
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    with_rows: bool,
    backend: str,
    device: str,
):
    inputs = make_inputs(*shape, dtype, device, weight_dtype)
    rows = randperm(shape[0], device=device)[: shape[0] // 2 + 1] if with_rows else None
    out = layer_norm(*inputs, rows=rows, backend=backend)
    low_precision = layer_norm_reference(*inputs, eps=1e-6, rows=rows)
    truth = layer_norm_reference(*(x.double() for x in inputs), eps=1e-6, rows=rows)
    assert out.dtype == dtype
    assert_within_error_budget(out, low_precision=low_precision, truth=truth, name="layer_norm")


@pytest.mark.parametrize("shape", ROW_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_rows", [False, True])
def test_gradients_match_reference(
    shape: tuple[int, int], dtype: torch.dtype, with_rows: bool, backend: str, device: str
):
    originals = make_inputs(*shape, dtype, device)
    rows = randperm(shape[0], device=device)[: shape[0] // 2 + 1] if with_rows else None

    def gradients(dtype: torch.dtype, function, **options) -> list[torch.Tensor]:
        inputs = leaves(*originals, dtype=dtype)
        out = function(*inputs, eps=1e-6, rows=rows, **options)
        incoming = randn(*out.shape, dtype=originals[0].dtype, device=device, seed=3)
        return list(torch.autograd.grad(out, inputs, incoming.to(dtype)))

    out = gradients(dtype, layer_norm, backend=backend)
    low_precision = gradients(dtype, layer_norm_reference)
    truth = gradients(torch.float64, layer_norm_reference)
    for name, *candidates in zip(("x", "weight", "bias"), out, low_precision, truth, strict=True):
        assert_within_error_budget(
            candidates[0],
            low_precision=candidates[1],
            truth=candidates[2],
            name=f"layer_norm.d{name}",
        )


def test_gradcheck():
    inputs = leaves(*make_inputs(4, 5, torch.float64, "cpu"))
    rows = torch.tensor([3, 1])
    torch.autograd.gradcheck(lambda *xs: layer_norm(*xs, rows=rows), inputs)
    torch.autograd.gradcheck(lambda *xs: layer_norm(*xs), inputs)


def test_leading_dimensions_are_kept(backend: str, device: str):
    x, weight, bias = make_inputs(24, 8, torch.float32, device)
    out = layer_norm(x.view(2, 3, 4, 8), weight, bias, backend=backend)
    expected = layer_norm(x, weight, bias, backend=backend)
    assert torch.equal(out, expected.view(2, 3, 4, 8))


def test_nan_in_one_row_leaves_the_others_bit_equal(backend: str, device: str):
    x, weight, bias = make_inputs(33, 61, torch.float32, device)
    expected = layer_norm(x, weight, bias, backend=backend)
    x[7, 3] = torch.nan
    out = layer_norm(x, weight, bias, backend=backend)
    others = torch.arange(33, device=device) != 7
    assert torch.equal(out[others], expected[others])
    assert out[7].isnan().all()


def test_rows_equal_a_gather_before(backend: str, device: str):
    x, weight, bias = make_inputs(33, 61, torch.float32, device)
    rows = randperm(33, device=device)[:20]
    out = layer_norm(x, weight, bias, rows=rows, backend=backend)
    assert torch.equal(out, layer_norm(x[rows], weight, bias, backend=backend))


def test_a_large_mean_costs_no_more_than_the_reference_in_float32(backend: str, device: str):
    # One-pass variance would cancel here: mean 1e3, deviation 1.
    x, weight, bias = make_inputs(8, 384, torch.float32, device)
    x = x + 1e3
    assert_within_error_budget(
        layer_norm(x, weight, bias, backend=backend),
        low_precision=layer_norm_reference(x, weight, bias, eps=1e-6),
        truth=layer_norm_reference(x.double(), weight.double(), bias.double(), eps=1e-6),
        name="layer_norm.large_mean",
    )


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_fullgraph(compiler: str, backend: str, device: str):
    originals = make_inputs(6, 8, torch.float32, device)
    rows = torch.tensor([5, 0, 2], device=device)
    inputs, eager_inputs = leaves(*originals), leaves(*originals)
    compiled = torch.compile(layer_norm, fullgraph=True, dynamic=False, backend=compiler)
    out = compiled(*inputs, rows=rows, backend=backend)
    expected = layer_norm(*eager_inputs, rows=rows, backend=backend)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    for compiled_leaf, eager_leaf in zip(inputs, eager_inputs, strict=True):
        torch.testing.assert_close(compiled_leaf.grad, eager_leaf.grad)


@pytest.mark.filterwarnings(OPCHECK_WARNING)
@pytest.mark.parametrize("with_rows", [False, True])
def test_opcheck(with_rows: bool, on_native: None):
    x, weight, bias = make_inputs(6, 8, torch.float32, "cpu")
    rows = torch.tensor([5, 0, 2]) if with_rows else None
    for inputs in ([x, weight, bias], leaves(x, weight, bias)):
        torch.library.opcheck(
            torch.ops.dinov2_fast.layer_norm.default, (*inputs, 1e-6, rows, "native")
        )
    y, mean, rstd = torch.ops.dinov2_fast.layer_norm(x, weight, bias, 1e-6, rows, "native")
    torch.library.opcheck(
        torch.ops.dinov2_fast.layer_norm_backward.default,
        (y, x, weight, mean, rstd, rows, "native"),
    )


def test_a_row_selected_twice_collects_both_gradients(backend: str, device: str):
    inputs = leaves(*make_inputs(5, 8, torch.float32, device))
    rows = torch.tensor([1, 1, 4], device=device)
    out = layer_norm(*inputs, rows=rows, backend=backend)
    expected = layer_norm_reference(*inputs, eps=1e-6, rows=rows)
    incoming = randn(3, 8, device=device, seed=3)
    (dx,) = torch.autograd.grad(out, inputs[:1], incoming)
    (expected_dx,) = torch.autograd.grad(expected, inputs[:1], incoming)
    torch.testing.assert_close(dx, expected_dx)


def test_rows_of_a_wider_tensor_and_expanded_gradients(backend: str, device: str):
    wide = randn(7, 40, device=device)
    x, weight, bias = leaves(wide[1:, 3:25], *make_inputs(1, 22, torch.float32, device)[1:])
    strided = wide[1:, 3:25].requires_grad_()
    out = layer_norm(strided, weight, bias, backend=backend)
    assert torch.equal(out, layer_norm(x, weight, bias, backend=backend))
    (dx,) = torch.autograd.grad(out.sum(), strided)
    assert dx.shape == x.shape


def test_automatic_choice_takes_the_reference_for_what_the_kernel_refuses(on_native: None):
    weight, bias = randn(8), randn(8, seed=1)
    for x in (randn(4, 16)[:, ::2], randn(2, 6, 8)[:, ::2], randn(4, 8).half()):
        out = layer_norm(x, weight, bias)
        assert torch.equal(out, layer_norm_reference(x, weight, bias, eps=1e-6))
        with pytest.raises(BackendUnavailable, match="layer_norm: backend 'native' cannot"):
            layer_norm(x, weight, bias, backend="native")


def test_the_extension_itself_refuses_bad_arguments(on_native: None):
    x, y, vector = torch.zeros(4, 8), torch.full((2, 8), 7.0), torch.ones(8)
    rows, rstd = torch.tensor([0, 4]), torch.zeros(2)
    tensors = {"x": x, "weight": vector, "bias": vector, "rows": rows, "y": y, "rstd": rstd}
    good = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    good |= {"mean": 0, "num_x_rows": 5, "num_rows": 2, "channels": 8, "x_row_stride": 8}
    good |= {"y_row_stride": 8, "eps": 1e-6, "x_dtype": "float32", "y_dtype": "float32"}
    good |= {"threads": 1, "level": "auto"}
    for change, message in [
        ({"num_x_rows": 4}, r"rows must be in \[0, 4\), got 0 to 4"),
        ({"rows": 0, "num_x_rows": 1}, "num_rows must be at most 1, got 2"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"x_dtype": "float16"}, "x must be float32 or bfloat16, got float16"),
        ({"y": 0}, "y must not be a null pointer"),
        ({"weight": 0}, "weight must not be a null pointer"),
        ({"y_row_stride": 7}, "y: expected a row stride of at least 8 elements, got 7"),
    ]:
        with pytest.raises(ValueError, match=f"layer_norm_forward_cpu: {message}"):
            native.module().layer_norm_forward_cpu(**(good | change))
    assert torch.equal(y, torch.full((2, 8), 7.0))


def test_an_explicit_backend_without_a_kernel_raises():
    if environment.triton_interpreted():
        pytest.skip("Triton's interpreter runs the kernel on the CPU")
    with pytest.raises(BackendUnavailable, match="layer_norm has no triton kernel for cpu"):
        layer_norm(randn(2, 3), randn(3), randn(3), backend="triton")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"x": randn(5, 7)}, ValueError, r"x must have shape \[T, 8\], got \(5, 7\)"),
        ({"x": torch.ones(5, 8, dtype=torch.int64)}, TypeError, "x must be of a floating"),
        (
            {"x": randn(1, 5, 8), "rows": torch.tensor([0])},
            ValueError,
            r"x must have shape \[T, 8\]",
        ),
        ({"weight": randn(1, 8)}, ValueError, r"weight must have shape \[C\]"),
        ({"weight": randn(8).bfloat16()}, ValueError, "bias must have the dtype of weight"),
        ({"weight": randn(8).double(), "bias": randn(8).double()}, ValueError, "weight must be"),
        ({"weight": randn(8, device="meta")}, ValueError, "weight must be on cpu"),
        ({"bias": randn(7)}, ValueError, r"bias must have shape \[8\]"),
        ({"bias": randn(8, device="meta")}, ValueError, "bias must be on cpu"),
        ({"eps": 0.0}, ValueError, "eps must be finite and greater than 0"),
        ({"eps": float("nan")}, ValueError, "eps must be finite"),
        ({"rows": torch.tensor([0.0])}, TypeError, "rows must be an int64 tensor"),
        ({"rows": torch.tensor([[0]])}, ValueError, r"rows must have shape \[R\]"),
        ({"rows": torch.tensor([5])}, ValueError, r"rows must be in \[0, 5\), got 5 to 5"),
        ({"rows": torch.tensor([-1])}, ValueError, r"rows must be in \[0, 5\)"),
        ({"rows": torch.tensor([0], device="meta")}, ValueError, "rows must be on cpu"),
        ({"backend": "eager"}, ValueError, "backend must be one of"),
        (
            {"x": randn(5, 0), "weight": randn(0), "bias": randn(0)},
            ValueError,
            "channels must be finite and greater than 0",
        ),
    ],
)
def test_rejects_bad_input(changes: dict, error: type[Exception], message: str):
    good = {"x": randn(5, 8), "weight": randn(8), "bias": randn(8)}
    layer_norm(**good)
    with pytest.raises(error, match=message):
        layer_norm(**(good | changes))
