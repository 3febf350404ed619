"""Cross-entropy of scores that are never stored whole: features against prototypes, in chunks.

The scores of a chunk of rows are made, turned into losses and gradients, and overwritten by those
of the next chunk. Gradients are known up to the factor that arrives in the backward pass, so the
forward pass makes them and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2_fast.backends import choose_backend
from dinov2_fast.ops._checks import (
    accumulation_dtype,
    check_device,
    check_positive,
    check_row_range,
    check_tensor,
)
from dinov2_fast.ops._native_cpu import on_cuda, run_cpu
from dinov2_fast.ops.cross_entropy import (
    backward_native_,
    backward_triton_,
    cross_entropy_reference,
    forward_native,
    forward_triton,
    kernel_arguments,
    why_no_kernel,
)

_CHUNK_ELEMENTS = 2**24  # 64 MiB of float32: every chunk passes over the prototypes' gradient once
_MOST_TEACHERS = 2


def prototype_cross_entropy_reference(
    features: Tensor,
    weight: Tensor,
    teacher_logits: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    *,
    teacher_rows: Tensor,
    row_weights: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, Tensor]:
    """The scores whole, and one cross-entropy per teacher; arguments as below."""
    logits = F.linear(features, weight)  # [S, K]
    losses = torch.zeros_like(logits[:, 0], dtype=accumulation_dtype(logits, teacher_logits))
    for rows in teacher_rows.unbind(1):
        present = rows >= 0
        loss = cross_entropy_reference(
            logits[present],
            teacher_logits,
            log_u,
            log_v,
            teacher_rows=rows[present],
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
        )
        losses = losses.index_add(0, present.nonzero()[:, 0], loss)
    return (losses * row_weights).sum(), losses.detach()


def prototype_cross_entropy(
    features: Tensor,
    weight: Tensor,
    teacher_logits: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    *,
    teacher_rows: Tensor,
    row_weights: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of `features @ weight.T` against a teacher's targets.

    Scores are computed in float32 (float64 if anything is float64), whatever the type of the
    features, and outside autocast. What is kept for the backward pass has the size of the
    features and of the weight. Not for torch.compile: compose a linear layer and `cross_entropy`.

    Args:
        features: [S, Cb] student vectors; receives a gradient.
        weight: [K, Cb] prototypes; receives a gradient.
        teacher_logits: [R, K] scores of the teacher, in any floating-point type.
        log_u: [K] of the targets exp(teacher / teacher_temperature + log_u + log_v[:, None]).
        log_v: [R] of the targets.
        teacher_rows: [S, P] int64, the P = 1 or 2 teacher rows of each student row, whose targets
            are added; -1 is no teacher.
        row_weights: [S] weight of each row in the sum.
        student_temperature: divides the student's scores.
        teacher_temperature: divides the teacher's scores.
        chunk_rows: student rows whose scores exist at a time; None is at most 64 MiB of float32.
        backend: see `backends.choose_backend`; the op is `cross_entropy`.
    Returns:
        The weighted sum, a scalar with a graph, and the losses [S] of each row, unweighted and
        without a graph; both float32 (float64 if anything is float64).
    Raises:
        TypeError: tensors not floating-point, or rows not int64.
        ValueError: shapes or devices that do not fit, temperatures <= 0, rows out of range.
        BackendUnavailable: the explicit backend cannot compute this call.
    """
    op = "prototype_cross_entropy"
    tensors = (features, weight, teacher_logits, log_u, log_v, teacher_rows, row_weights)
    _check(op, *tensors)
    check_positive(
        op, student_temperature=student_temperature, teacher_temperature=teacher_temperature
    )
    if chunk_rows is None:
        rows = features.shape[0]
        num_chunks = max(-(-rows * weight.shape[0] // _CHUNK_ELEMENTS), 1)
        chunk_rows = max(-(-rows // num_chunks), 1)  # chunks of one size
    if chunk_rows < 1:
        raise ValueError(f"{op}: chunk_rows must be at least 1, got {chunk_rows}")
    refused = why_no_kernel(teacher_logits, log_u, log_v)
    if torch.float64 in (weight.dtype, row_weights.dtype):
        why = "weight and row_weights must not be float64"
        refused = {"native": why, "triton": why}
    chosen = choose_backend("cross_entropy", features, backend, refusals=refused)
    wants_gradient = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad)
    with torch.autocast(features.device.type, enabled=False):
        total, losses = _PrototypeCrossEntropy.apply(  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
            *(tensor if i < 2 else tensor.detach() for i, tensor in enumerate(tensors)),
            (student_temperature, teacher_temperature),
            chunk_rows,
            wants_gradient,
            _LOSSES_AND_GRADIENT[chosen],
        )
    return total, losses  # pyright: ignore[reportUnknownVariableType]


def _check(
    op: str,
    features: Tensor,
    weight: Tensor,
    teacher_logits: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    teacher_rows: Tensor,
    row_weights: Tensor,
) -> None:
    """Refuse tensors that do not fit together."""
    check_tensor(op, "features", features, "S", "Cb")
    check_tensor(op, "weight", weight, "K", features.shape[1])
    check_tensor(op, "teacher_logits", teacher_logits, "R", weight.shape[0])
    check_tensor(op, "log_u", log_u, weight.shape[0])
    check_tensor(op, "log_v", log_v, teacher_logits.shape[0])
    check_tensor(op, "row_weights", row_weights, features.shape[0])
    device = features.device
    check_device(op, device, weight=weight, teacher_logits=teacher_logits, log_u=log_u)
    check_device(op, device, log_v=log_v, row_weights=row_weights)
    if not isinstance(teacher_rows, Tensor) or teacher_rows.dtype != torch.int64:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"{op}: teacher_rows must be an int64 tensor, "
            f"got {getattr(teacher_rows, 'dtype', type(teacher_rows))}"
        )
    rows = features.shape[0]
    fits = teacher_rows.ndim == 2 and teacher_rows.shape[0] == rows
    if not fits or not 1 <= teacher_rows.shape[1] <= _MOST_TEACHERS:
        raise ValueError(
            f"{op}: teacher_rows must have shape [{rows}, 1] or [{rows}, 2], "
            f"got {tuple(teacher_rows.shape)}"
        )
    check_device(op, device, teacher_rows=teacher_rows)
    # -1 is allowed: shifted by one, what is left to refuse is what `check_row_range` refuses.
    check_row_range(op, "teacher_rows + 1", teacher_rows + 1, len(teacher_logits) + 1)


class _PrototypeCrossEntropy(torch.autograd.Function):
    """Losses and gradients chunk by chunk; the backward scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        teacher: Tensor,
        log_u: Tensor,
        log_v: Tensor,
        teacher_rows: Tensor,
        row_weights: Tensor,
        temperatures: tuple[float, float],
        chunk_rows: int,
        wants_gradient: bool,
        losses_and_gradient_: Callable[..., Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum and the losses [S]."""
        dtype = accumulation_dtype(features, weight, teacher, log_u, log_v, row_weights)
        x, prototypes = features.to(dtype), weight.to(dtype)
        weights, rows = row_weights.to(dtype), x.shape[0]
        losses = x.new_empty(rows)
        d_x = torch.empty_like(x) if wants_gradient else None
        d_prototypes = torch.zeros_like(prototypes) if wants_gradient else None
        buffer = x.new_empty(min(chunk_rows, rows), prototypes.shape[0])
        for begin in range(0, rows, chunk_rows):
            chunk = slice(begin, min(begin + chunk_rows, rows))
            logits = torch.mm(x[chunk], prototypes.T, out=buffer[: chunk.stop - begin])  # [c, K]
            losses[chunk] = losses_and_gradient_(
                logits, teacher, log_u, log_v, teacher_rows[chunk], weights[chunk], *temperatures
            )
            if d_x is not None and d_prototypes is not None:
                torch.mm(logits, prototypes, out=d_x[chunk])
                d_prototypes.addmm_(logits.T, x[chunk])
        if d_x is not None and d_prototypes is not None:
            ctx.save_for_backward(d_x.to(features.dtype), d_prototypes.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return torch.dot(losses, weights), losses

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_total: Tensor, grad_losses: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the forward pass times the incoming one."""
        gradients = ctx.saved_tensors
        # A factor of exactly 1 is the usual one, and the prototypes' gradient is large.
        if grad_total.device.type != "cpu" or grad_total.item() != 1.0:
            gradients = [gradient * grad_total for gradient in gradients]
        return *gradients, *([None] * 9)


def _losses_and_gradient_(
    logits: Tensor,
    teacher: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    teacher_rows: Tensor,
    row_weights: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Losses [c] of a chunk; its logits become the gradient of the weighted sum."""
    targets = torch.zeros_like(logits)
    for rows in teacher_rows.unbind(1):
        present = (rows >= 0).nonzero()[:, 0]
        taken = rows[present]
        scores = teacher.index_select(0, taken).to(logits.dtype).div_(teacher_temperature)
        scores.add_(log_u + log_v.index_select(0, taken).unsqueeze(1))
        targets.index_add_(0, present, scores.exp_())
    log_p = logits.div_(student_temperature)
    log_p.sub_(log_p.logsumexp(dim=1, keepdim=True))
    losses = -(targets * log_p).sum(dim=1)
    gradient = log_p.exp_().mul_(targets.sum(dim=1, keepdim=True)).sub_(targets)
    gradient.mul_((row_weights / student_temperature).unsqueeze(1))
    return losses


def _losses_and_gradient_native_(logits: Tensor, *arguments: Any) -> Tensor:
    """As `_losses_and_gradient_`, by native kernels."""
    if on_cuda(logits):
        return _in_two_passes_(forward_native, backward_native_, logits, *arguments)
    return _in_one_pass_(logits, *arguments)


def _in_one_pass_(
    logits: Tensor,
    teacher: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    teacher_rows: Tensor,
    row_weights: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """By the CPU kernel, which keeps a row in the cache until its gradient is written."""
    losses = logits.new_empty(logits.shape[0])
    log_u, log_v, row_weights = log_u.contiguous(), log_v.contiguous(), row_weights.contiguous()
    teacher_rows = teacher_rows.contiguous()
    slots = max(min(torch.get_num_threads(), logits.shape[0]), 1)
    scratch = logits.new_empty(slots, logits.shape[1])  # the targets of the row in work
    run_cpu(
        "cross_entropy_in_place_cpu",
        **kernel_arguments(
            logits,
            teacher,
            log_u,
            log_v,
            teacher_rows,
            float(student_temperature),
            float(teacher_temperature),
        ),
        row_weights=row_weights,
        loss=losses,
        scratch=scratch,
        slots=slots,
    )
    return losses


def _in_two_passes_(
    forward: Callable[..., tuple[Tensor, ...]],
    backward_: Callable[..., None],
    logits: Tensor,
    teacher: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    teacher_rows: Tensor,
    row_weights: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """By the kernels of the op's forward and backward."""
    vectors = log_u.contiguous(), log_v.contiguous(), teacher_rows.contiguous()
    temperatures = float(student_temperature), float(teacher_temperature)
    arguments = (logits, teacher, *vectors, *temperatures)
    losses, *statistics = forward(*arguments)
    backward_(logits, row_weights.contiguous(), *statistics, *arguments)
    return losses


_LOSSES_AND_GRADIENT = {
    "reference": _losses_and_gradient_,
    "native": _losses_and_gradient_native_,
    "triton": partial(_in_two_passes_, forward_triton, backward_triton_),
}
