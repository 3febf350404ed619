"""Triton's kernels of the losses as PTX, at the prototypes of every published head.

All other tests that execute them have fewer: here sums are as long as in training.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_fast import environment
from dinov2_fast.ops import cross_entropy as cross_entropy_file
from dinov2_fast.ops import sinkhorn as sinkhorn_file
from dinov2_fast.ops.cross_entropy import cross_entropy
from dinov2_fast.ops.sinkhorn import sinkhorn
from tests.inputs import DTYPES, leaves, randn
from tests.tolerance import assert_within_error_budget
from tools.simt.faults import Checks
from tools.simt.triton_launch import triton_on_cpu

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(environment.triton_interpreted(), reason="Triton interprets"),
]

# Class tokens of 64 images in two global crops, as many as a GPU may have in a batch. A column is
# summed in 8 steps, a row in 32 or 16; a test takes about a minute.
ROWS, PROTOTYPES = 128, 65536
UNCHECKED = Checks.none()  # the tests of fewer prototypes look for races and accesses out of bounds
TEACHER_TEMPERATURE = 0.04  # the lowest that training has, where targets are sharpest


@pytest.fixture(autouse=True)
def as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops take the backend that they are given, and ask nobody whether the CPU has it."""
    for file in (cross_entropy_file, sinkhorn_file):
        monkeypatch.setattr(file, "choose_backend", lambda op, tensor, backend, **_: backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_of_the_targets_are_within_budget(dtype: torch.dtype):
    logits = randn(ROWS, PROTOTYPES, dtype=dtype, scale=0.2)

    def vectors(logits: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        return sinkhorn(logits, temperature=TEACHER_TEMPERATURE, num_iterations=1, backend=backend)

    with triton_on_cpu(80, checks=UNCHECKED) as launches:
        found = vectors(logits, "triton")
    low, truth = vectors(logits, "reference"), vectors(logits.double(), "reference")
    assert len(launches) == 2  # further rounds would repeat them
    for name, *candidates in zip(("log_u", "log_v"), found, low, truth, strict=True):
        out, low_precision, exact = candidates
        assert_within_error_budget(out, low_precision=low_precision, truth=exact, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradient_are_within_budget(dtype: torch.dtype):
    teacher = randn(ROWS, PROTOTYPES, dtype=dtype, scale=0.2)
    student = randn(ROWS, PROTOTYPES, dtype=dtype, seed=1, scale=0.2)
    log_u, log_v = sinkhorn(teacher, temperature=TEACHER_TEMPERATURE, backend="reference")
    incoming = randn(ROWS, seed=2)

    def loss_and_gradient(wide: torch.dtype | None, backend: str) -> tuple[Tensor, Tensor]:
        (leaf,) = leaves(student, dtype=wide)
        others = [x if wide is None else x.to(wide) for x in (teacher, log_u, log_v, incoming)]
        loss = cross_entropy(
            leaf,
            *others[:3],
            teacher_rows=torch.arange(ROWS).flip(0),
            student_temperature=0.1,
            teacher_temperature=TEACHER_TEMPERATURE,
            backend=backend,
        )
        return loss.detach(), torch.autograd.grad(loss, leaf, others[3])[0]

    with triton_on_cpu(80, checks=UNCHECKED) as launches:
        found = loss_and_gradient(None, "triton")
    low = loss_and_gradient(None, "reference")
    truth = loss_and_gradient(torch.float64, "reference")
    assert len(launches) == 2
    for name, *candidates in zip(("loss", "gradient"), found, low, truth, strict=True):
        out, low_precision, exact = candidates
        assert_within_error_budget(out, low_precision=low_precision, truth=exact, name=name)
