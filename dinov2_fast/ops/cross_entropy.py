"""Cross-entropy between soft targets and student scores over many prototypes.

The targets are never stored: they come as teacher logits and the two vectors of Sinkhorn-Knopp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2_fast.backends import choose_backend
from dinov2_fast.ops._checks import (
    accumulation_dtype,
    check_device,
    check_positive,
    check_row_range,
    check_rows,
    check_tensor,
)
from dinov2_fast.ops._declare import declare
from dinov2_fast.ops._native import run_native
from dinov2_fast.ops._native_cpu import (
    FLOATS,
    NATIVE_DEVICES,
    Argument,
    dtype_name,
    on_cuda,
    refusals,
)
from dinov2_fast.ops._native_cuda import row_splits
from dinov2_fast.ops._triton import TRITON_DEVICES, device_of, for_triton

# The work goes block by block of rows: temporaries of the size of the logits would triple their
# memory. On the CPU a block (1 MiB in float32) stays in the cache; elsewhere it hides the launches.
_BLOCK_ELEMENTS_CPU = 2**18
_BLOCK_ELEMENTS = 2**26


def cross_entropy_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    *,
    teacher_rows: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """-sum_k target_k * log_softmax(student / temperature)_k of each row; arguments as below."""
    dtype = accumulation_dtype(student_logits, teacher_logits)
    teacher = teacher_logits.detach().index_select(0, teacher_rows).to(dtype)  # [S, K]
    offsets = log_u.detach() + log_v.detach().index_select(0, teacher_rows).unsqueeze(1)
    targets = (teacher / teacher_temperature + offsets).exp()
    return -(targets * (student_logits.to(dtype) / student_temperature).log_softmax(dim=1)).sum(1)


def cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    *,
    teacher_rows: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of each student row against the targets of its teacher row.

    Keeps nothing of the size of the logits but the logits themselves for the backward pass.

    Args:
        student_logits: [S, K]; the only argument that receives a gradient.
        teacher_logits: [R, K], in any floating-point type.
        log_u: [K] of the targets exp(teacher / teacher_temperature + log_u + log_v[:, None]).
        log_v: [R] of the targets.
        teacher_rows: [S] int64, the teacher row of each student row; rows may repeat.
        student_temperature: divides the student's logits.
        teacher_temperature: divides the teacher's logits.
        backend: see `backends.choose_backend`.
    Returns:
        [S] float32 (float64 if any logits are float64).
    Raises:
        TypeError: logits not floating-point, or rows not int64.
        ValueError: shapes or devices that do not fit, temperatures <= 0, rows out of range.
        BackendUnavailable: the explicit backend cannot compute this call.
    Source: Caron et al., "DINO", 2021, equation 1; Zhou et al., "iBOT", 2022, equation 2.
    """
    op = "cross_entropy"
    check_tensor(op, "student_logits", student_logits, "S", "K")
    check_tensor(op, "teacher_logits", teacher_logits, "R", student_logits.shape[1])
    check_tensor(op, "log_u", log_u, student_logits.shape[1])
    check_tensor(op, "log_v", log_v, teacher_logits.shape[0])
    device = student_logits.device
    check_device(op, device, teacher_logits=teacher_logits, log_u=log_u, log_v=log_v)
    check_rows(op, "teacher_rows", teacher_rows, device)
    # The kernels would take -1, which is no teacher.
    check_row_range(op, "teacher_rows", teacher_rows, teacher_logits.shape[0])
    if teacher_rows.shape[0] != student_logits.shape[0]:
        raise ValueError(
            f"{op}: teacher_rows must have one row for each of the {student_logits.shape[0]} "
            f"student rows, got {teacher_rows.shape[0]}"
        )
    check_positive(
        op, student_temperature=student_temperature, teacher_temperature=teacher_temperature
    )
    teacher_logits, log_u, log_v = teacher_logits.detach(), log_u.detach(), log_v.detach()
    refused = why_no_kernel(teacher_logits, log_u, log_v, student_logits=student_logits)
    chosen = choose_backend(op, student_logits, backend, refusals=refused)
    if chosen != "reference":
        rows = teacher_rows.contiguous().unsqueeze(1)
        vectors = log_u.contiguous(), log_v.contiguous()
        temperatures = float(student_temperature), float(teacher_temperature)
        return _forward(student_logits, teacher_logits, *vectors, rows, *temperatures, chosen)[0]
    return _CrossEntropy.apply(  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        student_logits,
        teacher_logits,
        log_u,
        log_v,
        teacher_rows,
        student_temperature,
        teacher_temperature,
    )


class _CrossEntropy(torch.autograd.Function):
    """The reference in blocks of rows; the backward computes targets and softmax again."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        log_u: Tensor,
        log_v: Tensor,
        rows: Tensor,
        student_temperature: float,
        teacher_temperature: float,
    ) -> Tensor:
        """Loss [S] of each row."""
        loss = log_u.new_empty(student.shape[0], dtype=accumulation_dtype(student, teacher))
        lse = torch.empty_like(loss)
        for block in _blocks(student):
            targets = _targets(teacher, log_u, log_v, rows[block], teacher_temperature, loss.dtype)
            scores = student[block].to(loss.dtype) / student_temperature  # [b, K]
            lse[block] = scores.logsumexp(dim=1)
            loss[block] = scores.sub_(lse[block].unsqueeze(1)).mul_(targets).sum(dim=1).neg_()
        ctx.save_for_backward(student, teacher, log_u, log_v, rows, lse)
        ctx.temperatures = student_temperature, teacher_temperature
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_loss: Tensor
    ) -> tuple[Tensor | None, ...]:
        """(softmax * sum(targets) - targets) / student_temperature, [S, K]."""
        student, teacher, log_u, log_v, rows, lse = ctx.saved_tensors
        student_temperature, teacher_temperature = ctx.temperatures
        grad = torch.empty_like(student)
        for block in _blocks(student):
            targets = _targets(teacher, log_u, log_v, rows[block], teacher_temperature, lse.dtype)
            scores = student[block].to(lse.dtype) / student_temperature  # [b, K]
            softmax = scores.sub_(lse[block].unsqueeze(1)).exp_()
            softmax.mul_(targets.sum(dim=1, keepdim=True)).sub_(targets)
            grad[block] = softmax.mul_((grad_loss[block] / student_temperature).unsqueeze(1))
        return grad, None, None, None, None, None, None


def _blocks(logits: Tensor) -> list[slice]:
    """Slices of rows that together hold about as many elements as a block should."""
    rows, columns = logits.shape
    elements = _BLOCK_ELEMENTS_CPU if logits.device.type == "cpu" else _BLOCK_ELEMENTS
    step = max(elements // max(columns, 1), 1)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _targets(
    teacher: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    rows: Tensor,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """Targets [b, K] of some student rows."""
    targets = teacher.index_select(0, rows).to(dtype).div_(temperature)
    return targets.add_(log_u).add_(log_v.index_select(0, rows).unsqueeze(1)).exp_()


def why_no_kernel(
    teacher: Tensor, log_u: Tensor, log_v: Tensor, **matrices: Tensor
) -> dict[str, str]:
    """Refusals for `choose_backend`: what the kernels do not take besides their main input.

    Args:
        teacher: [R, K] logits.
        log_u: [K] of the targets.
        log_v: [R] of the targets.
        matrices: name -> other logits whose columns must be adjacent.
    Returns:
        Empty, or "native" and "triton" -> why not.
    """
    if not log_u.dtype == log_v.dtype == torch.float32:
        why = f"log_u and log_v must be float32, got {dtype_name(log_u)} and {dtype_name(log_v)}"
        return {"native": why, "triton": why}
    logits = {"teacher_logits": teacher, **matrices}
    refused = refusals(logits, {}, floats=(*FLOATS, torch.float16))
    return refused | for_triton(refused)


def kernel_arguments(
    student: Tensor,
    teacher: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    rows: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> dict[str, Argument]:
    """What every native kernel of this op takes; rows are [S, P], and vectors are contiguous."""
    return {
        "student": student,
        "teacher": teacher,
        "log_u": log_u,
        "log_v": log_v,
        "teacher_rows": rows,
        "rows": student.shape[0],
        "prototypes": student.shape[1],
        "num_teacher_rows": teacher.shape[0],
        "num_teachers": rows.shape[1],
        "student_row_stride": student.stride(0),
        "teacher_row_stride": teacher.stride(0),
        "student_temperature": student_temperature,
        "teacher_temperature": teacher_temperature,
        "dtype": dtype_name(student),
        "teacher_dtype": dtype_name(teacher),
    }


def forward_native(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, temperature * log-sum-exp and sum of targets of each row, by native kernels."""
    loss, normalizer, target_sum = _forward_fake(student, *arguments)
    parts: dict[str, Argument] = {}
    if on_cuda(student):
        rows, splits = len(loss), row_splits(*student.shape)
        parts["num_splits"] = splits
        parts["partials"] = loss.new_empty(rows, splits, 4) if splits > 1 else None
    run_native(
        "cross_entropy_forward",
        **kernel_arguments(student, *arguments),
        **parts,
        loss=loss,
        normalizer=normalizer,
        target_sum=target_sum,
    )
    return loss, normalizer, target_sum


def _backward_native(grad_loss: Tensor, *arguments: Any) -> Tensor:
    """Gradient of the student's logits by native kernels."""
    student = arguments[2]
    grad = student.new_empty(student.shape)
    backward_native_(grad, grad_loss.contiguous(), *arguments)
    return grad


def backward_native_(
    grad: Tensor,
    grad_loss: Tensor,
    normalizer: Tensor,
    target_sum: Tensor,
    student: Tensor,
    *arguments: Any,
) -> None:
    """Write the gradient of the student's logits; on a GPU `grad` may be those logits."""
    run_native(
        "cross_entropy_backward",
        **kernel_arguments(student, *arguments),
        grad_loss=grad_loss,
        normalizer=normalizer,
        target_sum=target_sum,
        grad=grad,
        grad_row_stride=grad.stride(0),
    )


def forward_triton(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `forward_native`, by Triton."""
    from dinov2_fast.kernels import cross_entropy as kernels

    outputs = _forward_fake(student, *arguments)
    everything: list[Any] = [student, *arguments, *outputs]
    with device_of(student):
        kernels.forward(*everything)
    return outputs


def _backward_triton(grad_loss: Tensor, *arguments: Any) -> Tensor:
    """Gradient of the student's logits by Triton."""
    student = arguments[2]
    grad = student.new_empty(student.shape)
    backward_triton_(grad, grad_loss.contiguous(), *arguments)
    return grad


def backward_triton_(grad: Tensor, grad_loss: Tensor, *arguments: Any) -> None:
    """Write the gradient of the student's logits; `grad` may be those logits."""
    from dinov2_fast.kernels import cross_entropy as kernels

    everything: list[Any] = [grad_loss, *arguments, grad]
    with device_of(grad):
        kernels.backward(*everything)


def _forward_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss = student.new_empty(student.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(loss, dtype=torch.float64), torch.empty_like(loss)


def _backward_fake(
    grad_loss: Tensor, normalizer: Tensor, target_sum: Tensor, student: Tensor, *arguments: Any
) -> Tensor:
    return student.new_empty(student.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the inputs and two numbers a row."""
    _, normalizer, target_sum = output
    ctx.save_for_backward(normalizer, target_sum, *inputs[:5])
    ctx.options = inputs[5:]


def _gradient(ctx: Any, grad_loss: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the student and of nothing else."""
    return _backward(grad_loss, *ctx.saved_tensors, *ctx.options), *[None] * 7


_INPUTS = (
    "Tensor student, Tensor teacher, Tensor log_u, Tensor log_v, Tensor rows, "
    "float student_temperature, float teacher_temperature, str backend"
)
_backward = declare(
    f"cross_entropy_backward(Tensor grad_loss, Tensor normalizer, Tensor target_sum, {_INPUTS})"
    " -> Tensor",
    kernels={
        **dict.fromkeys(NATIVE_DEVICES, _backward_native),
        **dict.fromkeys(TRITON_DEVICES, _backward_triton),
    },
    fake=_backward_fake,
)
_forward = declare(
    f"cross_entropy({_INPUTS}) -> (Tensor, Tensor, Tensor)",
    kernels={
        **dict.fromkeys(NATIVE_DEVICES, forward_native),
        **dict.fromkeys(TRITON_DEVICES, forward_triton),
    },
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)
