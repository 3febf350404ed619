from __future__ import annotations

import math

import pytest
import torch

from dinov2_fast.errors import BackendUnavailable
from dinov2_fast.ops import cross_entropy as cross_entropy_file
from dinov2_fast.ops.cross_entropy import cross_entropy, cross_entropy_reference
from dinov2_fast.ops.sinkhorn import sinkhorn
from tests.inputs import COMPILERS, DTYPES, SCORE_SHAPES, leaves, randn
from tests.tolerance import assert_within_error_budget

TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.05}


def make_inputs(
    rows: int, prototypes: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict:
    """Twice as many student rows as teacher rows, each with some teacher row; unit-norm scores."""
    teacher = randn(rows, prototypes, dtype=dtype, device=device, seed=1, scale=0.2)
    log_u, log_v = sinkhorn(teacher, temperature=0.05)
    return {
        "student_logits": randn(2 * rows, prototypes, dtype=dtype, device=device, scale=0.2),
        "teacher_logits": teacher,
        "log_u": log_u,
        "log_v": log_v,
        "teacher_rows": (torch.arange(2 * rows) * 5 % rows).to(device),
        **TEMPERATURES,
    }


def widened(inputs: dict) -> dict:
    """The same inputs in float64."""
    return {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def test_reference_known_values():
    # Targets (1/4, 3/4) and (1/2, 1/2); student softmax (1/2, 1/2) and (1/4, 3/4).
    log3, log4 = math.log(3), math.log(4)
    inputs = {
        "teacher_logits": torch.tensor([[0.0, 0.5 * log3], [0.0, 0.0]]),
        "log_u": torch.tensor([1.0, 1.0]),
        "log_v": torch.tensor([-log4 - 1, -math.log(2) - 1]),
        "student_logits": torch.tensor([[3.0, 3.0], [0.0, 0.1 * log3], [0.0, 0.1 * log3]]),
        "teacher_rows": torch.tensor([0, 0, 1]),
        "student_temperature": 0.1,
        "teacher_temperature": 0.5,
    }
    expected = torch.tensor([math.log(2), log4 - 0.75 * log3, log4 - 0.5 * log3])
    torch.testing.assert_close(cross_entropy_reference(**inputs), expected)
    torch.testing.assert_close(cross_entropy(**inputs), expected)


@pytest.mark.parametrize("shape", SCORE_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(shape: tuple[int, int], dtype: torch.dtype, backend: str, device: str):
    inputs = make_inputs(*shape, dtype, device)
    out = cross_entropy(**inputs, backend=backend)
    assert out.dtype == torch.float32
    assert_within_error_budget(
        out,
        low_precision=cross_entropy_reference(**inputs),
        truth=cross_entropy_reference(**widened(inputs)),
        name="cross_entropy.loss",
    )


@pytest.mark.parametrize("shape", SCORE_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_match_reference(
    shape: tuple[int, int], dtype: torch.dtype, backend: str, device: str
):
    inputs = make_inputs(*shape, dtype, device)
    incoming = randn(2 * shape[0], device=device, seed=2)

    def gradient(function, inputs: dict, **options) -> torch.Tensor:
        (student,) = leaves(inputs["student_logits"])
        out = function(**(inputs | {"student_logits": student}), **options)
        return torch.autograd.grad(out, student, incoming.to(out.dtype))[0]

    assert_within_error_budget(
        gradient(cross_entropy, inputs, backend=backend),
        low_precision=gradient(cross_entropy_reference, inputs),
        truth=gradient(cross_entropy_reference, widened(inputs)),
        name="cross_entropy.gradient",
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("shape", [(7, 31), (1, 1)])
def test_opcheck(shape: tuple[int, int], on_native: None):
    inputs = list(make_inputs(*shape).values())
    inputs[4] = inputs[4].unsqueeze(1)
    ops, incoming = torch.ops.dinov2_fast, randn(2 * shape[0], seed=2)
    (student,) = leaves(inputs[0])
    torch.library.opcheck(ops.cross_entropy.default, (student, *inputs[1:], "native"))
    _, normalizer, total = ops.cross_entropy(*inputs, "native")
    arguments = (incoming, normalizer, total, *inputs, "native")
    torch.library.opcheck(ops.cross_entropy_backward.default, arguments)


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_is_within_budget_whatever_the_tail(
    level: str,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
):
    for prototypes in (*range(2, 36), 1023, 1025, 2049):  # tails of vectors and of blocks
        inputs = make_inputs(32, prototypes, teacher_dtype)
        wide = randn(64, prototypes + 5, dtype=dtype, seed=prototypes, scale=0.2)

        def both(function, inputs: dict, wide: torch.Tensor, **options) -> list[torch.Tensor]:
            student = wide[:, 3:-2].detach().requires_grad_()  # starts at no vector
            out = function(**(inputs | {"student_logits": student}), **options)
            return [out.detach(), *torch.autograd.grad(out.sum(), student)]

        out = both(cross_entropy, inputs, wide, backend="native")
        low = both(cross_entropy_reference, inputs, wide)
        truth = both(cross_entropy_reference, widened(inputs), wide.double())
        for name, a, b, c in zip(("loss", "gradient"), out, low, truth, strict=True):
            label = f"cross_entropy.{name} of {prototypes}"
            assert_within_error_budget(a, low_precision=b, truth=c, name=label)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_result_does_not_depend_on_the_number_of_threads(threads: int, on_native: None):
    before, inputs = torch.get_num_threads(), make_inputs(67, 4099)

    def both() -> list[torch.Tensor]:
        (student,) = leaves(inputs["student_logits"])
        out = cross_entropy(**(inputs | {"student_logits": student}), backend="native")
        return [out.detach(), *torch.autograd.grad(out.sum(), student)]

    expected = both()
    try:
        torch.set_num_threads(threads)
        out = both()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_automatic_choice_takes_the_reference_for_what_the_kernel_refuses(on_native: None):
    inputs = make_inputs(4, 7)
    strided = {"student_logits": inputs["student_logits"].T.contiguous().T}
    for changes in (strided, widened(inputs)):
        changed = inputs | changes
        torch.testing.assert_close(cross_entropy(**changed), cross_entropy_reference(**changed))
        with pytest.raises(BackendUnavailable, match="backend 'native' cannot compute"):
            cross_entropy(**changed, backend="native")


def test_gradcheck():
    inputs = widened(make_inputs(3, 5))
    (student,) = leaves(inputs.pop("student_logits"))
    torch.autograd.gradcheck(lambda s: cross_entropy(s, **inputs), student)
    torch.autograd.gradcheck(lambda s: cross_entropy_reference(s, **inputs), student)


def test_equals_torch_on_hard_targets():
    # Targets that are one prototype make it torch's own cross-entropy.
    inputs = widened(make_inputs(4, 7))
    labels = torch.tensor([3, 0, 6, 3])
    inputs["teacher_logits"] = torch.full((4, 7), -1e3, dtype=torch.float64)
    inputs["teacher_logits"][torch.arange(4), labels] = 0.0
    inputs["log_u"], inputs["log_v"] = torch.zeros(7), torch.zeros(4)
    scores = inputs["student_logits"] / inputs["student_temperature"]
    expected = torch.nn.functional.cross_entropy(
        scores, labels[inputs["teacher_rows"]], reduction="none"
    )
    torch.testing.assert_close(cross_entropy(**inputs), expected)


@pytest.mark.parametrize("rows_per_block", [1, 3, 64])
def test_blocks_change_nothing(rows_per_block: int, monkeypatch: pytest.MonkeyPatch):
    inputs = make_inputs(7, 31)
    whole, part = (leaves(inputs["student_logits"])[0] for _ in range(2))
    expected = cross_entropy(**(inputs | {"student_logits": whole}))
    expected.sum().backward()
    monkeypatch.setattr(cross_entropy_file, "_BLOCK_ELEMENTS_CPU", rows_per_block * 31)
    out = cross_entropy(**(inputs | {"student_logits": part}))
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(part.grad, whole.grad)


def test_targets_need_not_sum_to_one(backend: str):
    # Softmax-centering without its normaliser, or several teachers added up, scale the targets.
    inputs = make_inputs(4, 7)
    expected = 3 * cross_entropy(**inputs, backend=backend)
    inputs["log_v"] = inputs["log_v"] + math.log(3)
    torch.testing.assert_close(cross_entropy(**inputs, backend=backend), expected)


def test_only_the_student_receives_a_gradient(backend: str):
    inputs = make_inputs(4, 7)
    tensors = [inputs[n] for n in ("student_logits", "teacher_logits", "log_u", "log_v")]
    student, *others = leaves(*tensors)
    options = {"teacher_rows": inputs["teacher_rows"], **TEMPERATURES}
    cross_entropy(student, *others, **options, backend=backend).sum().backward()
    assert student.grad is not None
    assert all(tensor.grad is None for tensor in others)


def test_keeps_nothing_of_the_size_of_the_logits_but_the_logits(backend: str):
    inputs = make_inputs(16, 64)
    (student,) = leaves(inputs["student_logits"])
    inputs["student_logits"] = student
    given = {t.untyped_storage().data_ptr() for t in inputs.values() if torch.is_tensor(t)}
    extra_elements = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            extra_elements.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = cross_entropy(**inputs, backend=backend)
    assert sum(extra_elements) <= 2 * loss.numel()


def test_no_rows_give_an_empty_loss_with_a_graph(backend: str, device: str):
    inputs = make_inputs(3, 5, device=device)
    student = torch.empty(0, 5, device=device, requires_grad=True)
    inputs |= {"student_logits": student, "teacher_rows": inputs["teacher_rows"][:0]}
    loss = cross_entropy(**inputs, backend=backend)
    loss.sum().backward()
    assert loss.shape == (0,)
    assert student.grad.shape == (0, 5)


def test_nan_in_one_student_row_leaves_the_others_bit_equal(backend: str, device: str):
    inputs = make_inputs(7, 31, device=device)
    expected = cross_entropy(**inputs, backend=backend)
    inputs["student_logits"][4, 2] = torch.nan
    out = cross_entropy(**inputs, backend=backend)
    others = torch.arange(14, device=device) != 4
    assert torch.equal(out[others], expected[others])
    assert out[4].isnan()


def test_large_logits_do_not_overflow(backend: str, device: str):
    inputs = make_inputs(7, 31, device=device)
    inputs["student_logits"] = inputs["student_logits"] * 1e3
    assert (inputs["student_logits"].max() / 0.1).exp().isinf()
    assert_within_error_budget(
        cross_entropy(**inputs, backend=backend),
        low_precision=cross_entropy_reference(**inputs),
        truth=cross_entropy_reference(**widened(inputs)),
        name="cross_entropy.large",
    )


# What 24 bits leave of 1/0.1 and 1/0.04 is 0, of 1/0.7 less than 0: infinity times either, added
# to infinity, is NaN.
@pytest.mark.parametrize("temperatures", [(0.1, 0.04), (0.7, 0.7)], ids=str)
@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_scores_of_minus_infinity_have_no_weight(
    whose: str, temperatures: tuple[float, float], backend: str, device: str
):
    # More columns without weight than a kernel takes at once, from the first on.
    inputs = make_inputs(2, 4200, device=device)
    inputs |= dict(zip(TEMPERATURES, temperatures, strict=True))
    inputs[f"{whose}_logits"][:, :4150] = -torch.inf
    results = []
    for values, chosen in (
        (inputs, backend),
        (inputs, "reference"),
        (widened(inputs), "reference"),
    ):
        student = values["student_logits"].clone().requires_grad_()
        loss = cross_entropy(**(values | {"student_logits": student}), backend=chosen)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), student)))
    # Where the teacher has weight, a student without any is infinitely wrong.
    assert results[2][0].isposinf().all() == (whose == "student")
    for name, *tensors in zip(("loss", "gradient"), *results, strict=True):
        out, low_precision, truth = tensors
        assert_within_error_budget(
            out, low_precision=low_precision, truth=truth, name=f"cross_entropy.{name}"
        )


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_fullgraph(compiler: str, backend: str, device: str):
    inputs = make_inputs(3, 5, device=device)
    student, eager_student = leaves(inputs["student_logits"], inputs.pop("student_logits"))
    compiled = torch.compile(cross_entropy, fullgraph=True, dynamic=False, backend=compiler)
    out = compiled(student, **inputs, backend=backend)
    expected = cross_entropy(eager_student, **inputs, backend=backend)
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(student.grad, eager_student.grad)


def test_an_explicit_backend_without_a_kernel_raises():
    with pytest.raises(BackendUnavailable, match="cross_entropy has no triton kernel for cpu"):
        cross_entropy(**make_inputs(2, 3), backend="triton")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_logits": randn(3)}, ValueError, r"student_logits must have shape \[S, K\]"),
        ({"student_logits": [1.0]}, TypeError, "student_logits must be a tensor"),
        ({"student_logits": randn(6, 4)}, ValueError, r"teacher_logits must have shape \[R, 4\]"),
        ({"teacher_logits": randn(3, 4)}, ValueError, r"teacher_logits must have shape \[R, 5\]"),
        ({"teacher_logits": randn(3, 5, device="meta")}, ValueError, "teacher_logits must be on"),
        ({"log_u": randn(4)}, ValueError, r"log_u must have shape \[5\]"),
        ({"log_u": randn(5, device="meta")}, ValueError, "log_u must be on cpu"),
        ({"log_v": randn(4)}, ValueError, r"log_v must have shape \[3\]"),
        ({"log_v": randn(3, device="meta")}, ValueError, "log_v must be on cpu"),
        ({"teacher_rows": torch.zeros(6)}, TypeError, "teacher_rows must be an int64 tensor"),
        ({"teacher_rows": torch.tensor([0, 1, 2])}, ValueError, "each of the 6 student rows"),
        ({"teacher_rows": torch.full((6,), 3)}, ValueError, r"teacher_rows must be in \[0, 3\)"),
        ({"student_temperature": 0.0}, ValueError, "student_temperature must be finite"),
        ({"teacher_temperature": -1.0}, ValueError, "teacher_temperature must be finite"),
        ({"backend": "eager"}, ValueError, "backend must be one of"),
    ],
)
def test_rejects_bad_input(changes: dict, error: type[Exception], message: str):
    good = make_inputs(3, 5)
    with pytest.raises(error, match=message):
        cross_entropy(**(good | changes))
