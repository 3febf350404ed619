from __future__ import annotations

import math
import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast import native
from dinov2_fast.backends import use_backend
from dinov2_fast.errors import BackendUnavailable
from dinov2_fast.ops import swiglu as swiglu_module
from dinov2_fast.ops.swiglu import swiglu, swiglu_reference
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget

# (rows R, hidden F)
SHAPES = [
    (257, 1024),  # one 224 px crop of ViT-S/14 with SwiGLU
    (1, 1),  # one value: no neighbour to hide a wrong half
    (13, 61),  # primes: every vector width leaves a tail
    (5, 17),  # one past the 16 floats of the widest vector
    (0, 8),  # an empty branch
    (3, 0),  # nothing in a row
]
# opcheck itself looks at .grad of tensors that are not leaves.
OPCHECK_WARNING = "ignore:The .grad attribute of a Tensor that is not a leaf"


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest, backend: str, device: str) -> torch.dtype:
    if backend == "native" and device == "cpu" and request.param == torch.float16:
        pytest.skip("swiglu: native on cpu takes float32 and bfloat16")
    return request.param


def value_and_gradient(x12: Tensor, dh: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    leaf = x12.detach().requires_grad_()
    h = swiglu(leaf, backend=backend)
    (gradient,) = torch.autograd.grad(h, leaf, dh)
    return h.detach(), gradient


def assert_as_good_as_reference(x12: Tensor, dh: Tensor, backend: str) -> None:
    low = value_and_gradient(x12, dh, "reference")
    truth = value_and_gradient(x12.double(), dh.double(), "reference")
    out = value_and_gradient(x12, dh, backend)
    for name, a, b, c in zip(("h", "dx12"), out, low, truth, strict=True):
        assert_within_error_budget(a, low_precision=b, truth=c, name=f"swiglu.{name}")


def test_reference_known_values():
    x12 = torch.tensor([[0.0, math.log(3.0), 5.0, 8.0]], dtype=torch.float64)
    # silu(ln 3) = ln 3 * 3/4
    expected = torch.tensor([[0.0, 6.0 * math.log(3.0)]], dtype=torch.float64)
    torch.testing.assert_close(swiglu_reference(x12), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(backend: str, device: str, dtype: torch.dtype, shape: tuple[int, int]):
    rows, hidden = shape
    x12 = randn(rows, 2 * hidden, dtype=dtype, device=device, scale=3.0)
    out = swiglu(x12, backend=backend)
    assert out.is_contiguous()
    assert_within_error_budget(
        out,
        low_precision=swiglu_reference(x12),
        truth=swiglu_reference(x12.double()),
        name="swiglu",
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_match_reference(
    backend: str, device: str, dtype: torch.dtype, shape: tuple[int, int]
):
    rows, hidden = shape
    x12 = randn(rows, 2 * hidden, dtype=dtype, device=device, scale=3.0)
    dh = randn(rows, hidden, dtype=dtype, device=device, seed=1)
    assert_as_good_as_reference(x12, dh, backend)


@pytest.mark.filterwarnings(OPCHECK_WARNING)
@pytest.mark.parametrize("shape", [(4, 6), (0, 6), (1, 1)], ids=str)
def test_opcheck(device: str, shape: tuple[int, int], on_native: None):
    rows, hidden = shape
    wide = randn(rows, 2 * hidden + 3, device=device)
    dh = randn(rows, hidden, device=device)
    for x12 in (wide[:, : 2 * hidden], wide[:, : 2 * hidden].clone().requires_grad_()):
        torch.library.opcheck(torch.ops.dinov2_fast.swiglu.default, (x12, "native"))
        torch.library.opcheck(
            torch.ops.dinov2_fast.swiglu_backward.default, (dh, x12.detach(), "native")
        )


def test_compiles_fullgraph(backend: str, device: str):
    def twice(x12: Tensor) -> Tensor:
        return 2 * swiglu(x12, backend=backend)

    x12 = randn(6, 10, device=device).requires_grad_()
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(twice(x12).sum(), x12)
    (gradient,) = torch.autograd.grad(compiled(x12).sum(), x12)
    torch.testing.assert_close(compiled(x12), twice(x12), rtol=0, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x12", "error", "message"),
    [
        (torch.zeros(2, 3), ValueError, "even width 2F, got 3"),
        (torch.zeros(2, 3, 4), ValueError, r"must have shape \[R, 2F\], got \(2, 3, 4\)"),
        (torch.zeros(2, 4, dtype=torch.int32), TypeError, "floating-point type, got torch.int32"),
        ([1.0, 2.0], TypeError, "must be a tensor, got list"),
    ],
)
def test_rejects_bad_input(x12: Tensor, error: type[Exception], message: str):
    with pytest.raises(error, match=f"swiglu: x12 .*{message}"):
        swiglu(x12)


def test_gradcheck_of_reference_and_backward_formula():
    x12 = randn(3, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(swiglu_reference, (x12,))
    assert torch.autograd.gradgradcheck(swiglu_reference, (x12,))


def test_exports_with_the_choice_as_a_constant(on_native: None):
    class Layer(torch.nn.Module):
        def forward(self, x12: Tensor) -> Tensor:
            return swiglu(x12, backend="native")

    rows = torch.export.Dim("R")
    exported = torch.export.export(Layer(), (randn(5, 14),), dynamic_shapes=({0: rows},))
    assert "dinov2_fast.swiglu.default" in str(exported.graph)
    x12 = randn(9, 14, seed=2)
    torch.testing.assert_close(exported.module()(x12), swiglu(x12, backend="native"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set_is_within_budget_on_every_tail(level: str, dtype: torch.dtype):
    for hidden in range(1, 67):  # every tail of vectors of up to 32 elements, and past two of them
        x12 = randn(3, 2 * hidden, dtype=dtype, seed=hidden, scale=3.0)
        dh = randn(3, hidden, dtype=dtype, seed=hidden + 1)
        assert_as_good_as_reference(x12, dh, "native")


def test_every_bfloat16_gate_is_computed_as_exactly_as_its_type_allows(level: str):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    gates = bits.view(torch.bfloat16).view(256, 256)
    gates = gates[gates.isfinite().all(dim=1)]  # only rows of exponent 255 hold others
    x12 = torch.cat([gates, torch.ones_like(gates)], dim=1)
    truth = swiglu_reference(x12.double())
    out = swiglu(x12, backend="native")
    # float32 arithmetic may tip a tie: half an ulp of bf16, and a little of float32's.
    ulp = torch.ldexp(torch.ones_like(truth), truth.abs().frexp().exponent - 8)
    smallest = torch.finfo(torch.bfloat16).smallest_normal * torch.finfo(torch.bfloat16).eps
    error = (out.double() - truth).abs() / ulp.clamp_min(smallest)
    assert error.max() <= 0.501


def test_float32_error_is_the_sum_of_its_roundings(level: str):
    gates = torch.linspace(-85, 20, 400_001)[None]  # results below -85 are nearly subnormal
    x12 = torch.cat([gates, torch.ones_like(gates)], dim=1)
    truth = swiglu_reference(x12.double())
    error = (swiglu(x12, backend="native").double() - truth).abs() / truth.abs().clamp_min(1e-300)
    # exp within 1.01 ulp; 1 + e, the division and the product with the gate half an ulp each
    assert error.max() <= (1.01 + 3 * 0.5) * torch.finfo(torch.float32).eps


def test_bfloat16_ties_go_to_the_even_neighbour(level: str):
    # sigmoid(65) is 1 in float32; 325 and 335 lie half-way between bf16's even numbers.
    x12 = torch.tensor([[65.0, 67.0] * 20 + [5.0, 5.0] * 20], dtype=torch.bfloat16)
    assert swiglu(x12, backend="native")[0].tolist() == [324.0, 336.0] * 20


def test_reads_rows_of_a_wider_tensor_in_place(backend: str, device: str, dtype: torch.dtype):
    wide = randn(7, 40, dtype=dtype, device=device)
    x12 = wide[1:, 3:25]  # a storage offset, and rows 40 apart that start at no vector
    assert_as_good_as_reference(x12, randn(6, 11, dtype=dtype, device=device), backend)
    assert torch.equal(wide, randn(7, 40, dtype=dtype, device=device))


@pytest.mark.parametrize(
    "dh",
    [
        torch.ones(()).expand(6, 11),  # what sum() hands back: strides 0 and 0
        torch.ones(6, 1).expand(6, 11),
        torch.ones(1, 11).expand(6, 11),
        torch.ones(11, 6).T,
    ],
    ids=["scalar", "column", "row", "transposed"],
)
def test_gradients_of_any_layout_are_taken(backend: str, device: str, dh: Tensor):
    assert_as_good_as_reference(randn(6, 22, device=device), dh.to(device), backend)


def test_nan_and_infinity_come_out_as_in_the_reference(
    backend: str, device: str, dtype: torch.dtype
):
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 88.0, -88.0, -104.5, 1e30, -1e30, 1e-30]
    gates, values = torch.tensor(special, device=device), torch.tensor([1.0, math.nan, math.inf])
    x12 = torch.cat([gates.repeat(3), values.to(device).repeat_interleave(len(special))])[None]
    x12 = x12.to(dtype)
    # Kernels round once; the reference rounds the activation too: in float16 silu(-88) is 0 then,
    # and its product with infinity NaN.
    exact = x12 if backend == "reference" else x12.float()
    h, expected = swiglu(x12, backend=backend), swiglu_reference(exact).to(dtype)
    assert torch.equal(h.isnan(), expected.isnan())
    assert torch.equal(h.isinf(), expected.isinf())
    _, gradient = value_and_gradient(x12, torch.ones_like(h), backend)
    _, expected = value_and_gradient(x12, torch.ones_like(h), "reference")
    # The true limits at -inf are 0; the reference makes NaN of them, and no kernel may hide a NaN.
    assert gradient[0, gates.repeat(3).isnan().nonzero()].isnan().all()
    finite = torch.cat([gates.repeat(3).isfinite()] * 2)[None]
    assert torch.equal(gradient.isnan() & finite, expected.isnan() & finite)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_result_does_not_depend_on_the_number_of_threads(threads: int, on_native: None):
    before = torch.get_num_threads()
    x12, dh = randn(131, 2 * 2048), randn(131, 2048, seed=1)  # 8 threads' worth, a prime of rows
    expected = value_and_gradient(x12, dh, "native")
    try:
        torch.set_num_threads(threads)
        out = value_and_gradient(x12, dh, "native")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])


def test_kernels_get_the_number_of_threads_of_torch(
    on_native: None, monkeypatch: pytest.MonkeyPatch
):
    compute, given = native.module().swiglu_forward_cpu, []

    def spy(**arguments: Any) -> None:
        given.append(arguments["threads"])
        compute(**arguments)

    monkeypatch.setattr(native.module(), "swiglu_forward_cpu", spy)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            swiglu(randn(4, 16), backend="native")
    finally:
        torch.set_num_threads(before)
    assert given == [1, 3]


def _norm_with_one_thread() -> float:
    torch.set_num_threads(1)
    return float(swiglu(randn(131, 4096), backend="native").norm())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_computes_after_the_parent_used_threads(on_native: None):
    torch.set_num_threads(2)
    try:
        expected = float(swiglu(randn(131, 4096), backend="native").norm())
    finally:
        torch.set_num_threads(1)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_norm_with_one_thread).get(timeout=60) == expected


def test_saves_its_input_alone_for_backward(on_native: None):
    x12 = randn(4, 16).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(x12, backend="native")
    assert [t.data_ptr() for t in saved] == [x12.data_ptr()]


def test_automatic_choice_takes_the_reference_for_what_the_kernel_refuses(on_native: None):
    columns_apart = randn(4, 32)[:, ::2]
    for x12 in (columns_apart, randn(4, 16, dtype=torch.float64), randn(4, 16).half()):
        assert torch.equal(swiglu(x12), swiglu_reference(x12))
        with pytest.raises(BackendUnavailable, match="swiglu: backend 'native' cannot compute"):
            swiglu(x12, backend="native")


def test_second_derivatives_are_refused_with_the_way_out(on_native: None):
    x12 = randn(4, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(swiglu(x12, backend="native").sum(), x12, create_graph=True)
    with pytest.raises(BackendUnavailable, match="backend='reference'"):
        gradient.sum().backward()


def test_backward_runs_on_the_backend_of_its_forward(
    on_native: None, monkeypatch: pytest.MonkeyPatch
):
    calls: list[str] = []
    run = swiglu_module._backward
    monkeypatch.setattr(swiglu_module, "_backward", lambda *a: (calls.append(a[-1]), run(*a))[1])
    x12 = randn(4, 16).requires_grad_()
    with use_backend("native"):
        h = swiglu(x12)
    with use_backend("reference"):
        h.sum().backward()
    assert calls == ["native"]


GOOD = {"rows": 2, "hidden": 3, "x12_row_stride": 6, "h_row_stride": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "x12 must be float32 or bfloat16, got float16"),
        ({"rows": -1}, "rows must not be negative, got -1"),
        ({"hidden": -1}, "hidden must not be negative, got -1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"x12": 0}, "x12 must not be a null pointer"),
        ({"h": 0}, "h must not be a null pointer"),
        ({"h_row_stride": 2}, "h: expected a row stride of at least 3 elements, got 2"),
        ({"level": "sse9"}, "expected an instruction set of auto, baseline.*got 'sse9'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_extension_itself_refuses_bad_arguments(
    change: dict[str, object], message: str, on_native: None
):
    x12, h = torch.zeros(2, 6), torch.full((2, 3), 7.0)
    arguments = {"x12": x12.data_ptr(), "h": h.data_ptr(), **GOOD}
    arguments |= {"dtype": "float32", "threads": 1, "level": "auto"} | change
    with pytest.raises(ValueError, match=f"swiglu_forward_cpu: {message}"):
        native.module().swiglu_forward_cpu(**arguments)
    assert torch.equal(h, torch.full((2, 3), 7.0))
