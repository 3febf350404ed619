"""Calls that reach every instance of the kernels of the losses and of the optimizer."""

from __future__ import annotations

import torch

from dinov2_fast.ops.cross_entropy import cross_entropy
from dinov2_fast.ops.koleo import koleo
from dinov2_fast.ops.optimizer import adamw_ema_step, gradient_norm
from dinov2_fast.ops.sinkhorn import row_logsumexp, sinkhorn
from tools.kernel_report.cases import Calls, Case, Place, Types, normal


def run_sinkhorn(sizes: tuple[int, int], types: Types, place: Place, backend: str) -> Calls:
    """One round, and the logarithms of the rows' sums."""
    logits = place(normal(*sizes).to(types[0]))
    log_u, log_v = sinkhorn(logits, temperature=0.5, num_iterations=1, backend=backend)
    yield "round", {"log_u": log_u, "log_v": log_v}
    terms = normal(sizes[1], seed=1).to(log_u.dtype)
    yield "rows", {"lse": row_logsumexp(logits, terms, temperature=0.5, backend=backend)}


def run_cross_entropy(sizes: tuple[int, int], types: Types, place: Place, backend: str) -> Calls:
    """Targets of as many teacher rows, out of order; the losses and their gradient."""
    rows, prototypes = sizes
    student = place(normal(rows, prototypes).to(types[0])).requires_grad_()
    teacher = place(normal(rows, prototypes, seed=1).to(types[1]))
    # The vectors have the same values whatever the types, or they would not be a truth's.
    log_u = normal(prototypes, seed=2, scale=0.1)
    log_v = -(teacher.float() / 0.5 + log_u).logsumexp(1)
    wide = torch.promote_types(student.dtype, torch.float32)
    loss = cross_entropy(
        student,
        teacher,
        log_u.to(wide),
        log_v.to(wide),
        teacher_rows=torch.arange(rows).flip(0),
        student_temperature=0.5,
        teacher_temperature=0.5,
        backend=backend,
    )
    yield "forward", {"loss": loss.detach()}
    (gradient,) = torch.autograd.grad(loss, student, normal(rows, seed=3).to(loss.dtype))
    yield "backward", {"gradient": gradient}


def run_koleo(sizes: tuple[int, int], types: Types, place: Place, backend: str) -> Calls:
    """The loss of a batch of rows, and its gradient."""
    x = place(normal(*sizes).to(types[0])).requires_grad_()
    loss = koleo(x, backend=backend)
    yield "forward", {"loss": loss.detach()}
    (gradient,) = torch.autograd.grad(loss, x)
    yield "backward", {"gradient": gradient}


def run_optimizer(sizes: tuple[int, ...], types: Types, place: Place, backend: str) -> Calls:
    """Norm of the gradients, then a step of parameters, moments, teacher and copies.

    Types are those of the parameters and of the copies.
    """
    parameters, gradients, averages, squares, teacher = (
        [place(normal(size, seed=seed + 10 * i).to(types[0])) for i, size in enumerate(sizes)]
        for seed in range(5)
    )
    squares = [square.square() for square in squares]
    yield "norm", {"norm": gradient_norm(gradients, backend=backend)}
    copies, teacher_copies = (
        [place(torch.zeros_like(parameter, dtype=types[1])) for parameter in parameters]
        for _ in range(2)
    )
    adamw_ema_step(
        *(parameters, gradients, averages, squares, teacher),
        lr=1e-3,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.99,
        eps=1e-8,
        step=3,
        momentum=0.99,
        gradient_scale=0.5,
        copies=copies,
        ema_copies=teacher_copies,
        backend=backend,
    )
    lists = {"parameters": parameters, "teacher": teacher, "moments": averages, "squares": squares}
    lists |= {"copies": copies, "teacher copies": teacher_copies}
    yield "step", {name: torch.cat(tensors) for name, tensors in lists.items()}


_FLOAT, _BFLOAT, _HALF = torch.float32, torch.bfloat16, torch.float16
_SCORES = [
    (64, 8192),  # prototypes of small runs
    (64, 383),  # a prime: in elements
    (3, 65_536),  # rows so long that several CTAs share one
]
_PAIRS = [(_BFLOAT, _BFLOAT), (_HALF, _HALF), (_FLOAT, _FLOAT), (_BFLOAT, _HALF), (_FLOAT, _HALF)]

CASES: dict[str, list[Case]] = {
    "sinkhorn": [
        Case(run_sinkhorn, sizes, (dtype,))
        for sizes in _SCORES
        for dtype in (_BFLOAT, _HALF, _FLOAT)
    ],
    "cross_entropy": [
        Case(run_cross_entropy, sizes, types) for sizes in _SCORES for types in _PAIRS
    ],
    "koleo": [
        Case(run_koleo, sizes, (_FLOAT,))
        for sizes in ((64, 384), (17, 61), (640, 64), (640, 61))  # many rows have larger tiles
    ],
    "optimizer": [
        Case(run_optimizer, (5000, 0, 1, 383), types)
        for types in ((_FLOAT, _BFLOAT), (_FLOAT, _HALF), (_FLOAT, _FLOAT))
    ],
}
