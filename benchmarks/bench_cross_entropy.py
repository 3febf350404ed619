"""Cross-entropy over prototypes: on scores, and fused with the product that makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import gradient_of, measure, skip_unless_available
from benchmarks.shapes import SCORES
from dinov2_fast.ops.cross_entropy import cross_entropy, cross_entropy_reference
from dinov2_fast.ops.cross_entropy_prototypes import prototype_cross_entropy

TEACHER_ROWS = 64
BOTTLENECK = 256
TEMPERATURES: dict[str, Any] = {"student_temperature": 0.1, "teacher_temperature": 0.05}


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.2 * torch.randn(shape, generator=generator)).to(dtype)


def targets(prototypes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher scores and the vectors of a softmax of them."""
    teacher = numbers(TEACHER_ROWS, prototypes, dtype=dtype, seed=1)
    log_v = -(teacher.float() / TEMPERATURES["teacher_temperature"]).logsumexp(dim=1)
    return teacher, torch.zeros(prototypes), log_v


@pytest.mark.filterwarnings("default")  # inductor's own warnings are no failure of a measurement
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "shape"), SCORES)
@pytest.mark.parametrize("backend", ["reference", "compiled reference", "native", "triton"])
def test_cross_entropy(
    benchmark: Any, backend: str, device: str, shape: tuple[int, int], dtype: torch.dtype, mode: str
):
    skip_unless_available("cross_entropy", backend.removeprefix("compiled "), device)
    rows, prototypes = shape
    student = numbers(rows, prototypes, dtype=dtype).to(device)
    incoming = torch.ones(rows, device=device)
    vectors = [tensor.to(device) for tensor in targets(prototypes, dtype)]
    options = {"teacher_rows": torch.arange(rows, device=device) % TEACHER_ROWS, **TEMPERATURES}
    run: Callable[[Tensor], Tensor]
    if backend == "compiled reference":
        compiled = torch.compile(cross_entropy_reference, fullgraph=True)
        run = lambda x: compiled(x, *vectors, **options)  # noqa: E731
    else:
        run = lambda x: cross_entropy(x, *vectors, **options, backend=backend)  # noqa: E731
    once = student.numel() * student.element_size()
    if mode == "forward":
        work, num_bytes = lambda: run(student), once
    else:
        leaf = student.requires_grad_()
        # read by both passes, gradient written
        work, num_bytes = lambda: gradient_of(run, leaf, incoming), 3 * once
    measure(
        benchmark,
        work,
        op="cross_entropy",
        backend=backend,
        dtype=dtype,
        shape=shape,
        mode=mode,
        device=device,
        num_bytes=num_bytes + vectors[0].numel() * vectors[0].element_size(),
    )


@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize(("device", "shape"), SCORES)
@pytest.mark.parametrize(
    "backend", ["reference", "native", "triton", "native, scores stored", "triton, scores stored"]
)
def test_prototype_cross_entropy(
    benchmark: Any, backend: str, device: str, shape: tuple[int, int], teachers: int
):
    """From features to the gradients of features and prototypes, in float32."""
    chosen = backend.removesuffix(", scores stored")
    skip_unless_available("cross_entropy", chosen, device)
    rows, prototypes = shape
    features, weight = (
        F.normalize(numbers(count, BOTTLENECK, seed=2 * i), dim=1).to(device).requires_grad_()
        for i, count in enumerate(shape)
    )
    vectors = [tensor.to(device) for tensor in targets(prototypes, torch.float32)]
    teacher_rows = torch.stack([torch.arange(rows) + i for i in range(teachers)], 1) % TEACHER_ROWS
    teacher_rows, row_weights = teacher_rows.to(device), torch.full((rows,), 1 / rows).to(device)

    def fused() -> Tensor:
        return prototype_cross_entropy(
            features,
            weight,
            *vectors,
            teacher_rows=teacher_rows,
            row_weights=row_weights,
            **TEMPERATURES,
            backend=chosen,
        )[0]

    def composed() -> Tensor:
        logits = F.linear(features, weight)
        losses = [
            cross_entropy(logits, *vectors, teacher_rows=r, **TEMPERATURES, backend=chosen)
            for r in teacher_rows.T.contiguous()
        ]
        return (torch.stack(losses).sum(0) * row_weights).sum()

    run = fused if backend == chosen else composed
    measure(
        benchmark,
        lambda: torch.autograd.grad(run(), (features, weight)),
        op="prototype_cross_entropy",
        backend=backend,
        dtype=torch.float32,
        shape=(*shape, BOTTLENECK, teachers),
        mode="forward+backward",
        device=device,
        num_bytes=4 * 2 * (features.numel() + weight.numel()) + 4 * vectors[0].numel(),
        num_flops=3 * 2 * rows * prototypes * BOTTLENECK,
    )
