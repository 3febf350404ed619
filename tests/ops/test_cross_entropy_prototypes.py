"""No test_opcheck and no test_compiles_fullgraph: compiled code composes `cross_entropy` instead.

`backend` is that of the op cross_entropy, which this is a part of.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2_fast.errors import BackendUnavailable
from dinov2_fast.ops.cross_entropy_prototypes import (
    prototype_cross_entropy,
    prototype_cross_entropy_reference,
)
from tests.inputs import DTYPES, leaves, randn
from tests.tolerance import assert_within_error_budget

# (student rows S, channels Cb, prototypes K, teacher rows R)
SHAPES = [
    (66, 64, 4096, 12),  # several chunks of rows and blocks of columns
    (1, 1, 1, 1),  # nothing to hide behind
    (13, 5, 31, 7),  # primes
    (17, 16, 257, 3),  # one past a tile edge
]


def make_inputs(
    shape: tuple[int, ...] = (13, 5, 31, 7), dtype: torch.dtype = torch.float32, teachers: int = 2
) -> dict:
    """Unit features, unit prototypes, and rows with two, one and no teachers."""
    rows, channels, prototypes, teacher_rows = shape
    normalized = torch.nn.functional.normalize
    teacher = randn(teacher_rows, prototypes, seed=2, scale=0.2)
    log_v = -(teacher / 0.05 + 0.5).logsumexp(dim=1)
    chosen = torch.arange(rows * teachers).view(rows, teachers) * 5 % (teacher_rows + 1) - 1
    return {
        "features": normalized(randn(rows, channels), dim=1).to(dtype),
        "weight": normalized(randn(prototypes, channels, seed=1), dim=1),
        "teacher_logits": teacher.to(dtype),
        "log_u": torch.full((prototypes,), 0.5),
        "log_v": log_v,
        "teacher_rows": chosen,
        "row_weights": torch.rand(rows, generator=torch.Generator().manual_seed(3)),
        "student_temperature": 0.1,
        "teacher_temperature": 0.05,
    }


def widened(inputs: dict) -> dict:
    """The same inputs in float64."""
    return {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def everything(function, inputs: dict, *, factor: float = 0.5, **options) -> dict[str, Tensor]:
    """Total, losses and both gradients of factor * total."""
    features, weight = leaves(inputs["features"], inputs["weight"])
    changed = inputs | {"features": features, "weight": weight}
    total, losses = function(**changed, **options)
    gradients = torch.autograd.grad(total * factor, (features, weight))
    names = ("total", "losses", "d_features", "d_weight")
    return dict(zip(names, (total.detach(), losses, *gradients), strict=True))


def test_reference_known_values():
    # One feature along the first of two prototypes: scores (1, 0), softmax (3/4, 1/4).
    temperature = 1 / torch.tensor(3.0).log().item()
    inputs = {
        "features": torch.tensor([[1.0, 0.0]] * 3),
        "weight": torch.eye(2),
        "teacher_logits": torch.tensor([[0.0, -1e4], [0.0, 0.0]]),
        "log_u": torch.zeros(2),
        "log_v": torch.tensor([0.0, -0.6931471805599453]),
        "teacher_rows": torch.tensor([[0, -1], [0, 1], [-1, -1]]),
        "row_weights": torch.tensor([2.0, 1.0, 5.0]),
        "student_temperature": temperature,
        "teacher_temperature": 1.0,
    }
    log3, log4 = torch.tensor(3.0).log(), torch.tensor(4.0).log()
    expected = torch.stack([log4 - log3, log4 - log3 + log4 - log3 / 2, 0 * log3])
    for function in (prototype_cross_entropy_reference, prototype_cross_entropy):
        total, losses = function(**inputs)
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(total, 2 * expected[0] + expected[1])


@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape: tuple[int, ...], dtype: torch.dtype, teachers: int, backend: str):
    inputs = make_inputs(shape, dtype, teachers)
    out = everything(prototype_cross_entropy, inputs, backend=backend, chunk_rows=10)
    # The reference multiplies in the features' type; this op in float32.
    in_float32 = inputs | {"features": inputs["features"].float()}
    low = everything(prototype_cross_entropy_reference, in_float32)
    low["d_features"] = low["d_features"].to(dtype)
    truth = everything(prototype_cross_entropy_reference, widened(inputs))
    for name, value in out.items():
        label = f"prototype_cross_entropy.{name}"
        assert_within_error_budget(value, low_precision=low[name], truth=truth[name], name=label)


def test_gradcheck():
    inputs = widened(make_inputs((4, 3, 5, 3)))
    features, weight = leaves(inputs.pop("features"), inputs.pop("weight"))
    for function in (prototype_cross_entropy, prototype_cross_entropy_reference):
        torch.autograd.gradcheck(
            lambda f, w, run=function: run(f, w, **inputs)[0], (features, weight)
        )


@pytest.mark.parametrize("chunk_rows", [1, 4, 12, 13, 1000])
def test_chunks_change_no_loss(chunk_rows: int, backend: str):
    inputs = make_inputs()
    expected = everything(prototype_cross_entropy, inputs, backend=backend)
    out = everything(prototype_cross_entropy, inputs, backend=backend, chunk_rows=chunk_rows)
    for name, value in out.items():
        torch.testing.assert_close(value, expected[name])


class Allocations(TorchDispatchMode):
    """Bytes of the storage of everything that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.num_bytes.append(tensor.untyped_storage().nbytes())
        return out


def test_never_holds_more_scores_than_a_chunk(backend: str):
    if backend == "triton":
        pytest.skip("Triton's interpreter copies what it reads")
    rows, channels, prototypes, chunk_rows = 64, 4, 1024, 8
    inputs = make_inputs((rows, channels, prototypes, 4))
    given = inputs["teacher_logits"].numel()
    with Allocations() as made:
        everything(prototype_cross_entropy, inputs, backend=backend, chunk_rows=chunk_rows)
    assert max(made.num_bytes) == 4 * max(chunk_rows, channels) * prototypes > 4 * given
    default = 2**23 // prototypes
    assert default * prototypes * 4 == 32 * 2**20  # bytes


def test_keeps_the_gradients_and_nothing_of_the_size_of_scores(backend: str):
    inputs = make_inputs((64, 4, 1024, 4))
    inputs["features"], inputs["weight"] = leaves(inputs["features"], inputs["weight"])
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        prototype_cross_entropy(**inputs, backend=backend)
    assert kept == [(64, 4), (1024, 4)]


def test_without_gradients_only_losses_are_made(backend: str):
    inputs = make_inputs()
    total, losses = prototype_cross_entropy(**inputs, backend=backend)
    assert not total.requires_grad
    (inputs["features"],) = leaves(inputs["features"])
    with_graph, same = prototype_cross_entropy(**inputs, backend=backend)
    assert with_graph.requires_grad
    assert not same.requires_grad
    assert torch.equal(losses, same)
    assert torch.equal(total, with_graph.detach())


def test_one_of_two_gradients_can_be_asked_for_and_the_graph_used_twice(backend: str):
    inputs = make_inputs()
    expected = everything(prototype_cross_entropy, inputs, backend=backend)
    (features,) = leaves(inputs["features"])
    total, _ = prototype_cross_entropy(**(inputs | {"features": features}), backend=backend)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(total * 0.5, features, retain_graph=True)
        assert torch.equal(gradient, expected["d_features"])


def test_computes_in_float32_inside_autocast(backend: str):
    inputs = make_inputs()
    expected = everything(prototype_cross_entropy, inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = everything(prototype_cross_entropy, inputs, backend=backend)
    assert all(torch.equal(out[name], expected[name]) for name in expected)


def test_no_rows_give_zero_with_a_graph(backend: str):
    inputs = make_inputs((0, 5, 31, 7))
    out = everything(prototype_cross_entropy, inputs, backend=backend)
    assert out["total"] == 0
    assert out["losses"].shape == (0,)
    assert torch.equal(out["d_weight"], torch.zeros(31, 5))


def test_result_does_not_depend_on_the_number_of_threads(backend: str):
    inputs, before = make_inputs((66, 64, 4096, 12)), torch.get_num_threads()
    losses = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            losses.append(everything(prototype_cross_entropy, inputs, backend=backend)["losses"])
    finally:
        torch.set_num_threads(before)
    # The matrix products are torch's; their sums are short and of one thread each.
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_nan_in_one_row_leaves_the_losses_of_others_bit_equal(backend: str):
    inputs = make_inputs()
    _, expected = prototype_cross_entropy(**inputs, backend=backend)
    inputs["features"][4, 2] = torch.nan
    total, losses = prototype_cross_entropy(**inputs, backend=backend)
    others = torch.arange(13) != 4
    assert torch.equal(losses[others], expected[others])
    assert losses[4].isnan()
    assert total.isnan()


def test_an_explicit_backend_that_cannot_compute_this_raises():
    with pytest.raises(BackendUnavailable, match="cross_entropy has no triton kernel for cpu"):
        prototype_cross_entropy(**make_inputs(), backend="triton")
    with pytest.raises(BackendUnavailable, match="backend 'native' cannot compute"):
        prototype_cross_entropy(**widened(make_inputs()), backend="native")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": randn(3)}, ValueError, r"features must have shape \[S, Cb\]"),
        ({"weight": randn(31, 4)}, ValueError, r"weight must have shape \[K, 5\]"),
        ({"weight": randn(31, 5, device="meta")}, ValueError, "weight must be on cpu"),
        ({"teacher_logits": randn(7, 4)}, ValueError, r"teacher_logits must have shape \[R, 31\]"),
        ({"log_u": randn(4)}, ValueError, r"log_u must have shape \[31\]"),
        ({"log_v": randn(4)}, ValueError, r"log_v must have shape \[7\]"),
        ({"row_weights": randn(4)}, ValueError, r"row_weights must have shape \[13\]"),
        ({"teacher_rows": torch.zeros(13, 2)}, TypeError, "teacher_rows must be an int64 tensor"),
        ({"teacher_rows": torch.zeros(13).long()}, ValueError, r"shape \[13, 1\] or \[13, 2\]"),
        ({"teacher_rows": torch.zeros(13, 3).long()}, ValueError, r"shape \[13, 1\] or \[13, 2\]"),
        ({"teacher_rows": torch.full((13, 1), 7)}, ValueError, r"must be in \[0, 8\), got 8 to 8"),
        ({"teacher_rows": torch.full((13, 1), -2)}, ValueError, r"must be in \[0, 8\), got -1"),
        ({"student_temperature": 0.0}, ValueError, "student_temperature must be finite"),
        ({"teacher_temperature": -1.0}, ValueError, "teacher_temperature must be finite"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, got 0"),
        ({"backend": "eager"}, ValueError, "backend must be one of"),
    ],
)
def test_rejects_bad_input(changes: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=f"prototype_cross_entropy: .*{message}|{message}"):
        prototype_cross_entropy(**(make_inputs() | changes))
