"""Cross-entropy's kernels for a GPU, with many prototypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_fast.ops.cross_entropy import cross_entropy
from dinov2_fast.ops.cross_entropy_prototypes import prototype_cross_entropy
from dinov2_fast.ops.sinkhorn import sinkhorn
from tests.inputs import leaves, randn
from tests.tolerance import assert_within_error_budget

pytestmark = pytest.mark.gpu

TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.04}
# Types of student and teacher scores.
TYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def make_targets(
    rows: int, prototypes: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher scores between -1 and 1 as the head gives them, and the vectors of their targets."""
    logits = randn(rows, prototypes, dtype=dtype, device=device, scale=0.2)
    return logits, *sinkhorn(logits, temperature=0.04, backend="reference")


@pytest.mark.parametrize("types", TYPE_PAIRS, ids=str)
@pytest.mark.parametrize("full", [True, False])  # a multiple of a step, and one past it
def test_loss_and_gradient_are_within_budget(
    types: tuple[torch.dtype, torch.dtype], full: bool, kernels: str, device_of_kernels: str
):
    students, teachers, prototypes = (
        (257, 64, 65536) if device_of_kernels == "cuda" else (3, 2, 8192)
    )
    prototypes += 0 if full else 1
    teacher, log_u, log_v = make_targets(teachers, prototypes, types[1], device_of_kernels)
    student = randn(
        students, prototypes, dtype=types[0], device=device_of_kernels, seed=1, scale=0.3
    )
    rows = torch.arange(students, device=device_of_kernels) % teachers

    def outputs(dtype: torch.dtype | None, backend: str) -> list[Tensor]:
        (leaf,) = leaves(student, dtype=dtype)
        vectors = (log_u, log_v) if dtype is None else (log_u.to(dtype), log_v.to(dtype))
        logits = teacher if dtype is None else teacher.to(dtype)
        loss = cross_entropy(
            leaf, logits, *vectors, teacher_rows=rows, **TEMPERATURES, backend=backend
        )
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaf)]

    found, low = outputs(None, kernels), outputs(None, "reference")
    truth = outputs(torch.float64, "reference")
    for name, out, one, exact in zip(("loss", "gradient"), found, low, truth, strict=True):
        assert_within_error_budget(out, low_precision=one, truth=exact, name=name)
    assert all(map(torch.equal, found, outputs(None, kernels)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_that_are_never_stored_are_within_budget(
    dtype: torch.dtype, kernels: str, device_of_kernels: str
):
    students, prototypes = (70, 8192) if device_of_kernels == "cuda" else (5, 4097)
    teacher, log_u, log_v = make_targets(8, prototypes, torch.float16, device_of_kernels)
    originals = [
        randn(students, 64, dtype=dtype, device=device_of_kernels, seed=1, scale=0.1),
        randn(prototypes, 64, device=device_of_kernels, seed=2, scale=0.1),
    ]
    rows = torch.stack((torch.arange(students) % 8, torch.arange(students) % 3 - 1), dim=1).to(
        device_of_kernels
    )  # a second teacher, or none
    row_weights = torch.linspace(0.1, 1, students, device=device_of_kernels)

    def outputs(wide: bool, backend: str) -> list[Tensor]:
        kind = torch.float64 if wide else None
        inputs = leaves(*originals, dtype=kind)
        others = [t if kind is None else t.to(kind) for t in (teacher, log_u, log_v, row_weights)]
        total, losses = prototype_cross_entropy(
            *inputs,
            *others[:3],
            teacher_rows=rows,
            row_weights=others[3],
            **TEMPERATURES,
            chunk_rows=32,
            backend=backend,
        )
        return [losses, *torch.autograd.grad(total, inputs)]

    found, low, truth = (
        outputs(False, kernels),
        outputs(False, "reference"),
        outputs(True, "reference"),
    )
    names = ("losses", "d_features", "d_weight")
    for name, out, one, exact in zip(names, found, low, truth, strict=True):
        assert_within_error_budget(out, low_precision=one, truth=exact, name=name)
