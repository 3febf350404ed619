"""No test_opcheck: no backend registers anything with torch.library.

No test_compiles_fullgraph: the step mutates lists outside of any graph. No gradcheck: no gradients.
"""

from __future__ import annotations

import math

import pytest
import torch

from dinov2_fast import environment
from dinov2_fast.backends import DTYPES
from dinov2_fast.errors import BackendUnavailable
from dinov2_fast.ops.optimizer import (
    adamw_ema_reference,
    adamw_ema_step,
    clip_coefficient,
    gradient_norm,
)
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget

# A matrix of ViT-S, primes, an empty parameter, which begins where the next one does, and a scalar.
SHAPES = [(384, 1536), (13, 61), (0, 7), ()]

NUMBERS = {
    "lr": 1e-2,
    "weight_decay": 0.3,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "step": 1,
    "momentum": 0.9,
}

Lists = dict[str, list[torch.Tensor]]


def skip_unless_taken(backend: str, device: str, dtype: torch.dtype) -> None:
    """Skip a type that a backend says it has no kernel for."""
    compiled_for = "cuda" if backend == "triton" else device  # the CPU interprets it
    if dtype not in DTYPES.get(("optimizer", backend, compiled_for), (dtype,)):
        pytest.skip(f"{backend} takes no {dtype}")


def make_lists(
    dtype: torch.dtype = torch.float32, device: str = "cpu", shapes: list = SHAPES
) -> Lists:
    """State as after some steps: the moments are not zero and the teacher is not the student."""

    def tensors(seed: int, scale: float = 1.0) -> list[torch.Tensor]:
        options = {"dtype": dtype, "device": device, "scale": scale}
        return [randn(*shape, seed=seed + i, **options) for i, shape in enumerate(shapes)]

    return {
        "parameters": tensors(10),
        "gradients": tensors(20),
        "exp_avgs": tensors(30, 0.1),
        "exp_avg_sqs": [x.square() for x in tensors(40, 0.1)],
        "ema_parameters": tensors(50),
    }


def copied(lists: Lists, dtype: torch.dtype | None = None) -> Lists:
    return {n: [x.clone().to(dtype or x.dtype) for x in xs] for n, xs in lists.items()}


def reference_step(lists: Lists, **numbers) -> Lists:
    """The reference on copies of the lists, parameter by parameter."""
    after = copied(lists)
    for tensors in zip(*after.values(), strict=True):
        adamw_ema_reference(*tensors, gradient_scale=1.0, skip=None, **numbers)
    return after


def assert_bit_equal(lists: Lists, expected: Lists) -> None:
    for name, tensors in lists.items():
        for tensor, other in zip(tensors, expected[name], strict=True):
            assert torch.equal(tensor, other), name


def test_reference_known_values():
    # First step: bias correction makes m' = g and sqrt(v') = |g|, so p moves by lr * sign(g).
    lists = {
        "parameters": [torch.tensor([1.0, -2.0])],
        "gradients": [torch.tensor([4.0, -8.0])],
        "exp_avgs": [torch.zeros(2)],
        "exp_avg_sqs": [torch.zeros(2)],
        "ema_parameters": [torch.tensor([0.0, 0.0])],
    }
    after = reference_step(lists, **(NUMBERS | {"lr": 0.1, "weight_decay": 0.5}))
    expected = {
        "parameters": [torch.tensor([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1])],
        "gradients": [torch.tensor([4.0, -8.0])],
        "exp_avgs": [torch.tensor([0.4, -0.8])],
        "exp_avg_sqs": [torch.tensor([0.16, 0.64])],
        "ema_parameters": [torch.tensor([0.085, -0.18])],
    }
    for name, (tensor,) in after.items():
        torch.testing.assert_close(tensor, expected[name][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_reference(dtype: torch.dtype, backend: str, device: str):
    skip_unless_taken(backend, device, dtype)
    lists = make_lists(dtype, device)
    numbers = NUMBERS | {"step": 7}
    low_precision = reference_step(lists, **numbers)
    truth = reference_step(copied(lists, torch.float64), **numbers)
    out = copied(lists)
    adamw_ema_step(**out, **numbers, backend=backend)
    for name, tensors in out.items():
        for index, tensor in enumerate(tensors):
            assert_within_error_budget(
                tensor,
                low_precision=low_precision[name][index],
                truth=truth[name][index],
                name=f"optimizer.{name}[{index}]",
            )


def test_eps_bounds_the_step_of_what_hardly_has_a_gradient(backend: str, device: str):
    # As of prototypes that no image chose: the root of the second moment is of the size of eps.
    lists = make_lists(device=device, shapes=[(13, 61)])
    for name, size in (("gradients", 1e-8), ("exp_avgs", 1e-8), ("exp_avg_sqs", 1e-16)):
        lists[name][0].mul_(size)
        lists[name][0][:3] = 0.0
    low_precision = reference_step(lists, **NUMBERS)
    truth = reference_step(copied(lists, torch.float64), **NUMBERS)
    adamw_ema_step(**lists, **NUMBERS, backend=backend)
    for name, (tensor,) in lists.items():
        one, exact = low_precision[name][0], truth[name][0]
        assert_within_error_budget(tensor, low_precision=one, truth=exact, name=name)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_equals_torch_over_several_steps(weight_decay: float, backend: str, device: str):
    skip_unless_taken(backend, device, torch.float64)
    lists = make_lists(torch.float64, device, [(13, 61), ()])
    for name in ("exp_avgs", "exp_avg_sqs"):
        lists[name] = [torch.zeros_like(x) for x in lists[name]]
    judged = [torch.nn.Parameter(p.clone()) for p in lists["parameters"]]
    teachers = [x.clone() for x in lists["ema_parameters"]]
    optimizer = torch.optim.AdamW(judged, lr=1.0, betas=(0.9, 0.99), weight_decay=weight_decay)
    for step in range(1, 6):
        lr, momentum = 0.01 * step, 0.9 + 0.01 * step
        lists["gradients"] = [
            randn(*p.shape, dtype=torch.float64, device=device, seed=step) for p in judged
        ]
        for parameter, gradient in zip(judged, lists["gradients"], strict=True):
            parameter.grad = 0.5 * gradient
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        for teacher, parameter in zip(teachers, judged, strict=True):
            teacher.copy_(momentum * teacher + (1 - momentum) * parameter.detach())
        changes = {"lr": lr, "step": step, "momentum": momentum, "weight_decay": weight_decay}
        scale = torch.tensor(0.5, dtype=torch.float64, device=device)
        adamw_ema_step(**lists, **(NUMBERS | changes), gradient_scale=scale, backend=backend)
    for out, expected in zip(lists["parameters"], judged, strict=True):
        torch.testing.assert_close(out, expected.detach(), rtol=1e-12, atol=1e-14)
    for out, expected in zip(lists["ema_parameters"], teachers, strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)


def test_without_a_teacher_the_student_moves_the_same(backend: str, device: str):
    with_teacher, without = make_lists(device=device), make_lists(device=device)
    adamw_ema_step(**with_teacher, **NUMBERS, backend=backend)
    adamw_ema_step(**(without | {"ema_parameters": None}), **NUMBERS, backend=backend)
    for name in ("parameters", "exp_avgs", "exp_avg_sqs"):
        for tensor, expected in zip(without[name], with_teacher[name], strict=True):
            assert torch.equal(tensor, expected)


@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_hold_the_new_values_rounded_once(dtype, with_teacher, backend: str, device: str):
    lists, plain = make_lists(device=device), make_lists(device=device)
    teacher = {} if with_teacher else {"ema_parameters": None}
    copies, ema_copies = (
        [None, *(torch.full_like(x, math.nan, dtype=dtype) for x in lists["parameters"][1:])]
        for _ in range(2)
    )
    both = {"copies": copies, "ema_copies": ema_copies if with_teacher else ()}

    adamw_ema_step(**(lists | teacher), **both, **NUMBERS, backend=backend)
    adamw_ema_step(**(plain | teacher), **NUMBERS, backend=backend)

    assert_bit_equal(lists, plain)  # copies change nothing else
    pairs = [(copies, "parameters"), (ema_copies, "ema_parameters")][: 1 + with_teacher]
    for written, name in pairs:
        for copy, source in zip(written[1:], lists[name][1:], strict=True):
            assert torch.equal(copy, source.to(dtype))


def test_a_skipped_step_writes_no_copy(backend: str, device: str):
    lists = make_lists(device=device)
    copies = [torch.zeros_like(x, dtype=torch.bfloat16) for x in lists["parameters"]]
    if device != "cpu":
        pytest.skip("there the copies are written again, with the same values")

    adamw_ema_step(**lists, copies=copies, skip=torch.tensor(True), **NUMBERS, backend=backend)

    assert all(not copy.any() for copy in copies)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_zero_copies_and_momentum_one_freezes(momentum: float, backend: str, device: str):
    lists = make_lists(device=device)
    before = copied(lists)
    adamw_ema_step(**lists, **(NUMBERS | {"momentum": momentum}), backend=backend)
    expected = before["ema_parameters"] if momentum else lists["parameters"]
    for teacher, tensor in zip(lists["ema_parameters"], expected, strict=True):
        assert torch.equal(teacher, tensor)


def test_no_learning_rate_moves_the_moments_but_no_parameter(backend: str, device: str):
    # The prototypes of a frozen last layer: their Adam state accumulates, they stay.
    lists = make_lists(device=device)
    before = copied(lists)
    adamw_ema_step(**lists, **(NUMBERS | {"lr": 0.0}), backend=backend)
    assert all(map(torch.equal, lists["parameters"], before["parameters"]))
    assert not torch.equal(lists["exp_avgs"][0], before["exp_avgs"][0])


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_a_skipped_step_changes_no_bit(value: float, backend: str, device: str):
    lists = make_lists(device=device)
    lists["gradients"][1].fill_(value)
    before = copied(lists)
    scale = torch.tensor(value, device=device)
    skip = torch.tensor(True, device=device)
    adamw_ema_step(**lists, **NUMBERS, gradient_scale=scale, skip=skip, backend=backend)
    for name in lists:
        for tensor, expected in zip(lists[name], before[name], strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("skipped", [True, False])
def test_a_skip_that_stays_on_the_device_does_the_same(skipped: bool):
    # What the reference does where `skip` may not be read: tested on the CPU, one tensor at a time.
    lists = make_lists()
    if skipped:
        lists["gradients"][1][0, 0] = math.nan
        lists["gradients"][0][0, 0] = math.inf
    expected = copied(lists) if skipped else reference_step(lists, **NUMBERS)
    for tensors in zip(*lists.values(), strict=True):
        adamw_ema_reference(*tensors, gradient_scale=1.0, skip=torch.tensor(skipped), **NUMBERS)
    del lists["gradients"], expected["gradients"]
    assert_bit_equal(lists, expected)


def test_skip_false_is_a_step(backend: str, device: str):
    lists, expected = make_lists(device=device), make_lists(device=device)
    skip = torch.tensor(False, device=device)
    adamw_ema_step(**lists, **NUMBERS, skip=skip, backend=backend)
    adamw_ema_step(**expected, **NUMBERS, backend=backend)
    assert_bit_equal(lists, expected)


def test_numbers_in_tensors_on_the_cpu_are_read_at_once(backend: str, device: str):
    lists, expected = make_lists(device=device), make_lists(device=device)
    names = ("lr", "weight_decay", "step", "momentum")
    tensors = {name: torch.tensor(NUMBERS[name], dtype=torch.float64) for name in names}
    adamw_ema_step(**lists, **(NUMBERS | tensors), backend=backend)
    adamw_ema_step(**expected, **NUMBERS, backend=backend)
    assert_bit_equal(lists, expected)


def test_gradients_are_not_changed(backend: str, device: str):
    lists = make_lists(device=device)
    before = copied(lists)
    adamw_ema_step(**lists, **NUMBERS, gradient_scale=0.25, backend=backend)
    assert all(map(torch.equal, lists["gradients"], before["gradients"]))


def test_parameters_that_require_gradients_are_taken(backend: str, device: str):
    lists = make_lists(device=device)
    expected = copied(lists)
    for parameter in lists["parameters"]:
        parameter.requires_grad_()
    adamw_ema_step(**lists, **NUMBERS, backend=backend)
    adamw_ema_step(**expected, **NUMBERS, backend=backend)
    assert_bit_equal(lists, expected)


def test_norm_known_values():
    norm = gradient_norm([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]]), torch.zeros(0)])
    assert norm.item() == 5.0
    assert norm.shape == ()
    assert gradient_norm([]).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norm_is_summed_in_float32(dtype: torch.dtype, backend: str, device: str):
    skip_unless_taken(backend, device, dtype)
    gradients = make_lists(dtype, device)["gradients"]
    gradients[1] = gradients[1] * 1e3  # squares overflow float16
    norm = gradient_norm(gradients, backend=backend)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    low_precision = flat.float().norm()
    assert_within_error_budget(
        norm, low_precision=low_precision, truth=flat.double().norm(), name="gradient_norm"
    )


def test_squares_that_overflow_only_together_make_the_norm_infinite(backend: str, device: str):
    gradients = [torch.full((1,), 1.5e19, device=device) for _ in range(2)]
    assert gradient_norm(gradients, backend=backend).isinf()
    assert gradient_norm(gradients[:1], backend=backend).isfinite()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_norm_shows_non_finite_gradients(value: float, backend: str, device: str):
    gradients = make_lists(device=device)["gradients"]
    gradients[0][3, 3] = value
    assert not gradient_norm(gradients, backend=backend).isfinite()


@pytest.mark.parametrize(
    ("norm", "max_norm", "coefficient"),
    [(6.0, 3.0, 3 / 6.000001), (3.0, 3.0, 3 / 3.000001), (1.0, 3.0, 1.0), (0.0, 3.0, 1.0)],
)
def test_clip_coefficient_known_values(norm: float, max_norm: float, coefficient: float):
    out = clip_coefficient(torch.tensor(norm, dtype=torch.float64), max_norm)
    torch.testing.assert_close(out.item(), coefficient)


def test_clipping_equals_torch():
    gradients = make_lists()["gradients"]
    judged = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(judged, gradients, strict=True):
        parameter.grad = gradient.clone()
    expected_norm = torch.nn.utils.clip_grad_norm_(judged, 3.0)
    norm = gradient_norm(gradients, backend="reference")
    torch.testing.assert_close(norm, expected_norm)
    coefficient = clip_coefficient(norm, 3.0)
    for gradient, parameter in zip(gradients, judged, strict=True):
        torch.testing.assert_close(gradient * coefficient, parameter.grad)


def test_an_explicit_backend_without_a_kernel_raises():
    if environment.triton_interpreted():
        pytest.skip("Triton's interpreter runs the kernels on the CPU")
    with pytest.raises(BackendUnavailable, match="optimizer has no triton kernel for cpu"):
        adamw_ema_step(**make_lists(), **NUMBERS, backend="triton")
    with pytest.raises(BackendUnavailable, match="optimizer has no triton kernel for cpu"):
        gradient_norm([randn(3)], backend="triton")


def test_no_parameters_are_a_step():
    adamw_ema_step([], [], [], [], None, **NUMBERS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gradients": []}, ValueError, "gradients must have one tensor for each of the 1"),
        ({"gradients": [randn(3, 2)]}, ValueError, r"gradients\[0\] must have shape, dtype"),
        ({"exp_avgs": [randn(2, 3).double()]}, ValueError, r"exp_avgs\[0\] must have shape"),
        ({"exp_avg_sqs": [randn(2, 3, device="meta")]}, ValueError, r"exp_avg_sqs\[0\] must"),
        ({"ema_parameters": [randn(3)]}, ValueError, r"ema_parameters\[0\] must have shape"),
        ({"lr": -1.0}, ValueError, "lr must be at least 0"),
        ({"lr": math.nan}, ValueError, "lr must be at least 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0"),
        ({"beta1": 1.0}, ValueError, r"beta1 must be in \[0, 1\)"),
        ({"beta2": -0.1}, ValueError, r"beta2 must be in \[0, 1\)"),
        ({"eps": 0.0}, ValueError, "eps must be finite and greater than 0"),
        ({"step": 0}, ValueError, "step must be at least 1"),
        ({"momentum": 1.1}, ValueError, r"momentum must be in \[0, 1\]"),
        ({"lr": torch.ones(1)}, TypeError, r"lr must be a number or of shape \[\], got \(1,\)"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be at least 0, got -1"),
        ({"step": torch.tensor(0.0)}, ValueError, "step must be at least 1, got 0"),
        ({"copies": [None, None]}, ValueError, "copies must have one tensor or None for each"),
        ({"copies": [randn(3).bfloat16()]}, ValueError, r"copies\[0\] must have shape and device"),
        ({"copies": [randn(2, 3).int()]}, TypeError, r"copies\[0\] must be of a floating-point"),
        ({"ema_copies": [randn(3)]}, ValueError, r"ema_copies\[0\] must have shape and device"),
        ({"gradient_scale": torch.ones(1)}, TypeError, "gradient_scale must be a number or"),
        ({"skip": torch.tensor(1.0)}, TypeError, "skip must be bool of shape"),
        ({"skip": torch.tensor([True])}, TypeError, "skip must be bool of shape"),
        ({"backend": "eager"}, ValueError, "backend must be one of"),
    ],
)
def test_rejects_bad_input(changes: dict, error: type[Exception], message: str):
    good = make_lists(shapes=[(2, 3)]) | NUMBERS
    with pytest.raises(error, match=message):
        adamw_ema_step(**(good | changes))


def test_norm_and_clip_reject_bad_input():
    with pytest.raises(TypeError, match="gradient_norm: gradients must be of a floating"):
        gradient_norm([torch.ones(3, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"clip_coefficient: norm must have shape \[\]"):
        clip_coefficient(torch.ones(1), 3.0)
    with pytest.raises(ValueError, match="max_norm must be finite and greater than 0"):
        clip_coefficient(torch.tensor(1.0), 0.0)
