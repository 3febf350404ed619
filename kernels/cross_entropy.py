"""Cross-entropy of student scores against soft targets that are made of teacher scores in passing.

One program reads a row of both once and keeps the largest score, the sum of exponentials relative
to it, the sum of the targets and the sum of targets times scores, all rescaled when a larger score
comes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels.launches import launchable

COLUMNS = 4096  # prototypes of a step


@triton.jit
def _times_rest(x, factor_rest):
    """X times what is left of a factor; infinity times 0 or the other sign would be NaN."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x * factor_rest)


@triton.jit
def _times(x, factor, factor_rest):
    """X times a number of more than 24 bits: temperatures are small, and their quotients large."""
    return x * factor + _times_rest(x, factor_rest)


@triton.jit
def _targets(
    teacher_ptr,  # [R, K]
    log_u,  # [COLUMNS] of these prototypes
    log_v_ptr,  # [R] float32
    rows_ptr,  # [S, P] int64, -1 is no teacher
    row,  # of the student
    k,  # [COLUMNS] prototypes
    inside,
    stride_tr,
    inverse,
    inverse_rest,
    NUM_TEACHERS: tl.constexpr,
):
    """Sum over teachers of exp(teacher / temperature + log_u + log_v); 0 outside."""
    targets = tl.zeros_like(log_u)
    for p in tl.static_range(NUM_TEACHERS):
        teacher_row = tl.load(rows_ptr + row * NUM_TEACHERS + p).to(tl.int64)
        present = teacher_row >= 0
        teacher_row = tl.where(present, teacher_row, 0)
        teacher_ptrs = teacher_ptr + teacher_row * stride_tr + k
        teacher = tl.load(teacher_ptrs, mask=inside & present, other=0.0).to(tl.float32)
        log_v = tl.load(log_v_ptr + teacher_row, mask=present, other=0.0)
        # The two large terms first: their sum is small, and what is added to it rounds little.
        scores = (teacher * inverse + log_v) + (_times_rest(teacher, inverse_rest) + log_u)
        targets += tl.where(inside & present, tl.exp(scores), 0.0)
    return targets


@triton.jit
def _forward_kernel(
    student_ptr,  # [S, K]
    teacher_ptr,  # [R, K]
    log_u_ptr,  # [K] float32
    log_v_ptr,  # [R] float32
    rows_ptr,  # [S, P] int64
    loss_ptr,  # [S] float32
    normalizer_ptr,  # [S] float64: temperature * log-sum-exp
    target_sum_ptr,  # [S] float32
    num_columns,  # K
    stride_sr,
    stride_tr,
    temperature,  # of the student
    temperature_rest,
    student_inverse,
    student_inverse_rest,
    teacher_inverse,
    teacher_inverse_rest,
    NUM_TEACHERS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full([], -float("inf"), dtype=tl.float32)
    exp_sum = tl.zeros([], dtype=tl.float32)
    target_sum = tl.zeros([], dtype=tl.float32)
    product = tl.zeros([], dtype=tl.float32)  # of targets and (score - largest) / temperature
    for first in range(0, num_columns, COLUMNS):
        k = first + tl.arange(0, COLUMNS)
        inside = k < num_columns
        student_ptrs = student_ptr + row * stride_sr + k
        student = tl.load(student_ptrs, mask=inside, other=-float("inf")).to(tl.float32)
        log_u = tl.load(log_u_ptr + k, mask=inside, other=0.0)
        targets = _targets(
            teacher_ptr,
            log_u,
            log_v_ptr,
            rows_ptr,
            row,
            k,
            inside,
            stride_tr,
            teacher_inverse,
            teacher_inverse_rest,
            NUM_TEACHERS,
        )
        before = largest
        largest = tl.maximum(before, tl.max(student, axis=0))
        base = tl.where(largest == -float("inf"), 0.0, largest)
        scores = _times(student - base, student_inverse, student_inverse_rest)
        step = _times(before - base, student_inverse, student_inverse_rest)
        step = tl.where(before == -float("inf"), 0.0, step)
        exp_sum = exp_sum * tl.exp(step) + tl.sum(tl.where(inside, tl.exp(scores), 0.0), axis=0)
        product += target_sum * step + tl.sum(tl.where(inside, targets * scores, 0.0), axis=0)
        target_sum += tl.sum(targets, axis=0)
    log_sum = tl.log(exp_sum.to(tl.float64))
    tl.store(loss_ptr + row, target_sum * log_sum.to(tl.float32) - product)
    normalizer = largest.to(tl.float64) + _times(log_sum, temperature, temperature_rest)
    tl.store(normalizer_ptr + row, normalizer)
    tl.store(target_sum_ptr + row, target_sum)


@triton.jit
def _backward_kernel(
    grad_loss_ptr,  # [S] float32
    normalizer_ptr,  # [S] float64
    target_sum_ptr,  # [S] float32
    student_ptr,  # [S, K]
    teacher_ptr,  # [R, K]
    log_u_ptr,  # [K] float32
    log_v_ptr,  # [R] float32
    rows_ptr,  # [S, P] int64
    grad_ptr,  # [S, K], may be the student's scores
    num_columns,  # K
    stride_sr,
    stride_tr,
    stride_gr,
    student_inverse,
    student_inverse_rest,
    teacher_inverse,
    teacher_inverse_rest,
    NUM_TEACHERS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = k < num_columns
    student_ptrs = student_ptr + row * stride_sr + k
    student = tl.load(student_ptrs, mask=inside, other=0.0).to(tl.float32)
    log_u = tl.load(log_u_ptr + k, mask=inside, other=0.0)
    targets = _targets(
        teacher_ptr,
        log_u,
        log_v_ptr,
        rows_ptr,
        row,
        k,
        inside,
        stride_tr,
        teacher_inverse,
        teacher_inverse_rest,
        NUM_TEACHERS,
    )
    normalizer = tl.load(normalizer_ptr + row)
    high = normalizer.to(tl.float32)
    low = (normalizer - high.to(tl.float64)).to(tl.float32)
    softmax = tl.exp(_times((student - high) - low, student_inverse, student_inverse_rest))
    factor = tl.load(grad_loss_ptr + row) * student_inverse
    grad = (softmax * tl.load(target_sum_ptr + row) - targets) * factor
    grad_ptrs = grad_ptr + row * stride_gr + k
    tl.store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def forward(
    student: Tensor,
    teacher: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    rows: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    loss: Tensor,
    normalizer: Tensor,
    target_sum: Tensor,
) -> None:
    """Writes loss, temperature * log-sum-exp and the sum of the targets of each row, [S]."""
    if student.shape[0] == 0:
        return
    launchable(_forward_kernel, student)[(student.shape[0],)](
        student,
        teacher,
        log_u,
        log_v,
        rows,
        loss,
        normalizer,
        target_sum,
        student.shape[1],
        student.stride(0),
        teacher.stride(0),
        *_split(student_temperature),
        *_split(1 / student_temperature),
        *_split(1 / teacher_temperature),
        NUM_TEACHERS=rows.shape[1],
        COLUMNS=_columns(student),
        num_warps=8,
    )


def backward(
    grad_loss: Tensor,
    normalizer: Tensor,
    target_sum: Tensor,
    student: Tensor,
    teacher: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    rows: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    grad: Tensor,
) -> None:
    """Writes the gradient of the student's scores, [S, K]; it may overwrite them."""
    if student.numel() == 0:
        return
    columns = _columns(student)
    grid = (student.shape[0], triton.cdiv(student.shape[1], columns))
    launchable(_backward_kernel, student)[grid](
        grad_loss,
        normalizer,
        target_sum,
        student,
        teacher,
        log_u,
        log_v,
        rows,
        grad,
        student.shape[1],
        student.stride(0),
        teacher.stride(0),
        grad.stride(0),
        *_split(1 / student_temperature),
        *_split(1 / teacher_temperature),
        NUM_TEACHERS=rows.shape[1],
        COLUMNS=columns,
        num_warps=8,
    )


def _columns(student: Tensor) -> int:
    """Prototypes of a step; not many more than there are."""
    return min(COLUMNS, triton.next_power_of_2(max(int(student.shape[1]), 1)))


def _split(number: float) -> tuple[float, float]:
    """The number rounded to 24 bits, and what is left of it."""
    scaled = (2.0**29 + 1) * number
    high = scaled - (scaled - number)
    return high, number - high
