"""No test_gradients_match_reference: the targets carry no gradient (asserted below)."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2_fast.errors import BackendUnavailable
from dinov2_fast.ops.sinkhorn import row_logsumexp, sinkhorn, sinkhorn_reference
from tests.inputs import DTYPES, SCORE_SHAPES, randn
from tests.tolerance import assert_within_error_budget


def textbook(logits: torch.Tensor, temperature: float, num_iterations: int = 3) -> torch.Tensor:
    """Sinkhorn-Knopp on the whole matrix in float64, with every factor of the textbook."""
    matrix = (logits.double() / temperature).exp()
    matrix /= matrix.sum()
    num_rows, num_columns = matrix.shape
    for _ in range(num_iterations):
        matrix /= matrix.sum(dim=0, keepdim=True) * num_columns
        matrix /= matrix.sum(dim=1, keepdim=True) * num_rows
    return matrix * num_rows


def targets(logits: torch.Tensor, temperature: float, vectors: tuple) -> torch.Tensor:
    """The targets of the two vectors, in the vectors' precision."""
    log_u, log_v = vectors
    scores = logits.to(log_u.dtype) / temperature
    return (scores + log_u + log_v.unsqueeze(1)).exp()


def reference_targets(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    vectors = sinkhorn_reference(logits, temperature=temperature, num_iterations=3, group=None)
    return targets(logits, temperature, vectors)


def test_reference_known_values():
    # M = [[1, 1], [1, 3]]. One round: u = (1/2, 1/4), M u = (3/4, 5/4), v = (4/3, 4/5).
    logits = 0.5 * torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])
    vectors = sinkhorn_reference(logits, temperature=0.5, num_iterations=1, group=None)
    expected_u, expected_v = torch.tensor([1 / 2, 1 / 4]), torch.tensor([4 / 3, 4 / 5])
    torch.testing.assert_close(vectors[0].exp(), expected_u)
    torch.testing.assert_close(vectors[1].exp(), expected_v)
    expected = torch.tensor([[2 / 3, 1 / 3], [2 / 5, 3 / 5]])
    torch.testing.assert_close(targets(logits, 0.5, vectors), expected)


@pytest.mark.parametrize("shape", SCORE_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(shape: tuple[int, int], dtype: torch.dtype, backend: str, device: str):
    logits = randn(*shape, dtype=dtype, device=device, scale=0.1)
    vectors = sinkhorn(logits, temperature=0.05, backend=backend)
    assert all(vector.dtype == torch.float32 for vector in vectors)
    assert_within_error_budget(
        targets(logits, 0.05, vectors),
        low_precision=reference_targets(logits, 0.05),
        truth=reference_targets(logits.double(), 0.05),
        name="sinkhorn.targets",
    )


@pytest.mark.parametrize("shape", SCORE_SHAPES)
@pytest.mark.parametrize("num_iterations", [1, 3, 10])
def test_equals_the_textbook_algorithm(shape: tuple[int, int], num_iterations: int):
    logits = randn(*shape, scale=0.1).double()
    vectors = sinkhorn(logits, temperature=0.05, num_iterations=num_iterations)
    expected = textbook(logits, 0.05, num_iterations)
    torch.testing.assert_close(targets(logits, 0.05, vectors), expected, rtol=1e-11, atol=0.0)


def test_extreme_logits_do_not_overflow(backend: str, device: str):
    # Exponents reach 400: exp overflows in float32 at 89, in float64 (the judge) at 710.
    logits = randn(32, 64, device=device, scale=4.0)
    assert (logits.max() / 0.04).exp().isinf()
    vectors = sinkhorn(logits, temperature=0.04, backend=backend)
    assert all(vector.isfinite().all() for vector in vectors)
    assert_within_error_budget(
        targets(logits, 0.04, vectors),
        low_precision=reference_targets(logits, 0.04),
        truth=textbook(logits, 0.04),
        name="sinkhorn.extreme",
    )


def test_constants_added_to_everything_rows_or_columns_change_no_target(backend: str, device: str):
    if backend != "reference":
        pytest.skip("float32 scores lose the digits that this compares under such constants")
    logits = randn(17, 31, device=device).double()
    expected = targets(logits, 0.1, sinkhorn(logits, temperature=0.1, backend=backend))
    for shift in (500.0, randn(17, 1, device=device, scale=50.0), randn(31, device=device, seed=1)):
        shifted = logits + shift
        out = targets(shifted, 0.1, sinkhorn(shifted, temperature=0.1, backend=backend))
        if not isinstance(shift, float) and shift.ndim == 2:
            # A row's own constant weighs it in the first column step only, so it needs convergence.
            options = {"temperature": 0.1, "num_iterations": 500, "backend": backend}
            out = targets(shifted, 0.1, sinkhorn(shifted, **options))
            converged = targets(logits, 0.1, sinkhorn(logits, **options))
            torch.testing.assert_close(out, converged, rtol=1e-6, atol=1e-12)
        else:
            torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SCORE_SHAPES)
def test_every_row_sums_to_one(shape: tuple[int, int], backend: str, device: str):
    logits = randn(*shape, device=device)
    vectors = sinkhorn(logits, temperature=0.07, backend=backend)
    total = targets(logits.double(), 0.07, tuple(v.double() for v in vectors)).sum(dim=1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=0.0)


def test_many_rounds_use_every_prototype_equally_often(backend: str, device: str):
    logits = randn(64, 16, device=device)
    vectors = sinkhorn(logits, temperature=0.5, num_iterations=200, backend=backend)
    usage = targets(logits, 0.5, vectors).sum(dim=0)
    torch.testing.assert_close(usage, torch.full_like(usage, 64 / 16), rtol=1e-4, atol=0.0)


def test_no_rows_give_finite_vectors(backend: str, device: str):
    log_u, log_v = sinkhorn(torch.empty(0, 5, device=device), temperature=0.1, backend=backend)
    assert torch.equal(log_u, torch.zeros(5, device=device))
    assert log_v.shape == (0,)


def test_a_prototype_without_any_weight_gets_no_target(backend: str, device: str):
    logits = randn(4, 3, device=device)
    logits[:, 1] = -torch.inf
    out = targets(logits, 0.1, sinkhorn(logits, temperature=0.1, backend=backend))
    assert torch.equal(out[:, 1], torch.zeros(4, device=device))
    torch.testing.assert_close(out.sum(dim=1), torch.ones(4, device=device))


def test_targets_carry_no_gradient_and_logits_are_not_changed(backend: str, device: str):
    logits = randn(4, 3, device=device).requires_grad_()
    before = logits.detach().clone()
    vectors = sinkhorn(logits, temperature=0.1, backend=backend)
    assert not any(vector.requires_grad for vector in vectors)
    assert torch.equal(logits.detach(), before)


def test_strides_do_not_matter(backend: str, device: str):
    logits = randn(31, 17, device=device).T
    # Kernels want adjacent columns; the automatic choice then takes the reference.
    strided = sinkhorn(logits, temperature=0.1, backend=None if backend != "reference" else backend)
    contiguous = sinkhorn(logits.contiguous(), temperature=0.1, backend=backend)
    assert_within_error_budget(
        targets(logits, 0.1, strided),
        low_precision=targets(logits, 0.1, contiguous),
        truth=textbook(logits, 0.1),
        name="sinkhorn.strided",
    )


@pytest.mark.parametrize("shape", [(64, 4096), (7, 31), (0, 5)])
def test_opcheck(shape: tuple[int, int], on_native: None):
    logits, log_v, log_u = randn(*shape), randn(shape[0], seed=1), randn(shape[1], seed=2)
    ops = torch.ops.dinov2_fast
    torch.library.opcheck(ops.sinkhorn_columns.default, (logits, log_v, 2.0, "native"))
    torch.library.opcheck(ops.sinkhorn_rows.default, (logits, log_u, 2.0, "native"))
    for want_sums in (False, True):
        arguments = (logits, log_u, log_v, 2.0, want_sums, "native")
        torch.library.opcheck(ops.sinkhorn_balance.default, arguments)


@pytest.mark.parametrize("below", [5.0, 50.0])
def test_a_row_far_below_the_others_has_targets_as_exact(below: float, backend: str, device: str):
    # Exponents of 50 and 500 less: the second row's exps relative to the columns are all 0.
    logits = randn(5, 33, device=device, scale=0.3)
    logits[2] -= below
    vectors = sinkhorn(logits, temperature=0.1, backend=backend)
    assert_within_error_budget(
        targets(logits, 0.1, vectors),
        low_precision=reference_targets(logits, 0.1),
        truth=reference_targets(logits.double(), 0.1),
        name="sinkhorn.targets",
    )


def test_the_kernels_read_the_scores_once_an_iteration_and_once_before(on_native: None):
    logits = randn(7, 33)

    class Calls(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Calls():
        sinkhorn(logits, temperature=0.1, num_iterations=3, backend="native")
    passes = [name for name in Calls.names if name.startswith("sinkhorn")]
    assert passes == ["sinkhorn_columns.default", *["sinkhorn_balance.default"] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(9, 513), (8, 31), (17, 1030)])
def test_every_instruction_set_is_within_budget(
    level: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
):
    wide = randn(shape[0], shape[1] + 5, dtype=dtype, scale=0.3)
    logits = wide[:, 3:-2]  # rows of a wider tensor, starting at no vector
    vectors = sinkhorn(logits, temperature=0.05, backend="native")
    assert_within_error_budget(
        targets(logits, 0.05, vectors),
        low_precision=reference_targets(logits, 0.05),
        truth=reference_targets(logits.double(), 0.05),
        name="sinkhorn.targets",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_of_ten_thousand_stay_finite(dtype: torch.dtype, backend: str, device: str):
    logits = (randn(32, 64, device=device).sign() * 1e4 + randn(32, 64, seed=1, device=device)).to(
        dtype
    )
    vectors = sinkhorn(logits, temperature=0.04, backend=backend)
    assert all(vector.isfinite().all() for vector in vectors)
    total = targets(logits, 0.04, vectors).sum(dim=1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0.1, atol=0)


def test_every_float16_is_read_exactly(on_native: None):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    values = values[values != -torch.inf]  # a row without any weight
    # One column a row: its logarithm of the sum of exp is the value itself.
    rows = torch.ops.dinov2_fast.sinkhorn_rows(values[:, None], torch.zeros(1), 1.0, "native")
    assert torch.equal(rows.nan_to_num(nan=7e7), values.float().nan_to_num(nan=7e7))


def test_a_broken_score_is_not_hidden(backend: str, device: str):
    logits = randn(4, 33, device=device)
    logits[2, 5] = torch.nan
    log_u, log_v = sinkhorn(logits, temperature=0.1, backend=backend)
    assert log_u[5].isnan()
    assert log_v.isnan().all()
    log_u, _ = sinkhorn(torch.full_like(logits, torch.nan), temperature=0.1, backend=backend)
    assert log_u.isnan().all()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_result_does_not_depend_on_the_number_of_threads(threads: int, on_native: None):
    before, logits = torch.get_num_threads(), randn(131, 4099)
    expected = sinkhorn(logits, temperature=0.1, backend="native")
    try:
        torch.set_num_threads(threads)
        out = sinkhorn(logits, temperature=0.1, backend="native")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_compiles_fullgraph(backend: str, device: str):
    # Tracing with fake tensors is all an op without gradient can break; code generation is torch's.
    logits = randn(5, 7, device=device)
    compiled = torch.compile(sinkhorn, fullgraph=True, dynamic=False, backend="aot_eager")
    out = compiled(logits, temperature=0.1, backend=backend)
    for vector, expected in zip(
        out, sinkhorn(logits, temperature=0.1, backend=backend), strict=True
    ):
        torch.testing.assert_close(vector, expected)


def test_an_explicit_backend_without_a_kernel_raises():
    with pytest.raises(BackendUnavailable, match="sinkhorn has no triton kernel for cpu"):
        sinkhorn(randn(2, 3), temperature=0.1, backend="triton")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a tensor"),
        ({"logits": randn(4)}, ValueError, r"logits must have shape \[R, K\]"),
        (
            {"logits": torch.ones(4, 3, dtype=torch.int64)},
            TypeError,
            "logits must be of a floating",
        ),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and greater than 0"),
        ({"temperature": math.inf}, ValueError, "temperature must be finite"),
        ({"num_iterations": 0}, ValueError, "num_iterations must be at least 1, got 0"),
        ({"backend": "eager"}, ValueError, "backend must be one of"),
    ],
)
def test_rejects_bad_input(changes: dict, error: type[Exception], message: str):
    good = {"logits": randn(4, 3), "temperature": 0.1}
    sinkhorn(**good)
    with pytest.raises(error, match=message):
        sinkhorn(**(good | changes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_logsumexp_is_that_of_torch(dtype: torch.dtype, backend: str, device: str):
    logits = randn(37, 257, dtype=dtype, device=device)
    log_u = randn(257, seed=1, device=device)
    rows = row_logsumexp(logits, log_u, temperature=0.05, backend=backend)
    truth = torch.logsumexp(logits.double() / 0.05 + log_u.double(), dim=1)
    low_precision = torch.logsumexp(logits.float() / 0.05 + log_u, dim=1)
    assert_within_error_budget(rows, low_precision=low_precision, truth=truth, name="rows")


def test_row_logsumexp_rejects_bad_input():
    with pytest.raises(ValueError, match=r"row_logsumexp: log_u must have shape \[3\]"):
        row_logsumexp(randn(2, 3), randn(4), temperature=0.1)
    with pytest.raises(ValueError, match="row_logsumexp: temperature"):
        row_logsumexp(randn(2, 3), randn(3), temperature=0.0)
