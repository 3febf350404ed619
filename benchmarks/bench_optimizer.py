"""One optimizer step of ViT-S, against its reference and against PyTorch's fused AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import CPU_ROW, GPU_ROW, measure, skip_unless_available
from dinov2_fast.ops.optimizer import adamw_ema_step, gradient_norm

WIDTH, BLOCKS = 384, 12
BLOCK_SHAPES = [
    *[(WIDTH,)] * 6,  # two layer norms, two layer scales
    (3 * WIDTH, WIDTH),
    (3 * WIDTH,),
    (WIDTH, WIDTH),
    (WIDTH,),
    (4 * WIDTH, WIDTH),
    (4 * WIDTH,),
    (WIDTH, 4 * WIDTH),
    (WIDTH,),
]
# 22 M parameters in 173 tensors: patch embedding, positions, class token, blocks, last norm.
SHAPES = [
    (WIDTH, 3, 14, 14),
    (1, 1370, WIDTH),
    *BLOCK_SHAPES * BLOCKS,
    *[(WIDTH,)] * 3,
]
CASES = [pytest.param("cpu", marks=CPU_ROW), pytest.param("cuda", marks=GPU_ROW)]
TORCH_FUSED = "torch fused"


def tensors(device: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.02 * torch.randn(shape, generator=generator).to(device) for shape in SHAPES]


def of_torch(
    parameters: list[Tensor], gradients: list[Tensor], teachers: list[Tensor]
) -> Callable[[], None]:
    """AdamW in one kernel, then the moving average in a second pass."""
    leaves: list[Tensor] = [torch.nn.Parameter(parameter) for parameter in parameters]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient
    optimizer = torch.optim.AdamW(leaves, lr=1e-3, weight_decay=0.04, fused=True)

    def step() -> None:
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(teachers, leaves, 0.006)  # pyright: ignore[reportPrivateImportUsage]

    return step


def of_ours(
    parameters: list[Tensor], gradients: list[Tensor], teachers: list[Tensor], backend: str
) -> Callable[[], None]:
    exp_avgs = [torch.zeros_like(x) for x in parameters]
    exp_avg_sqs = [torch.zeros_like(x) for x in parameters]
    return lambda: adamw_ema_step(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        teachers,
        lr=1e-3,
        weight_decay=0.04,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        step=1000,
        momentum=0.994,
        gradient_scale=0.5,
        backend=backend,
    )


@pytest.mark.parametrize("device", CASES)
@pytest.mark.parametrize("backend", ["reference", TORCH_FUSED, "native", "triton"])
def test_adamw_ema_step(benchmark: Any, backend: str, device: str):
    of_pytorch = backend == TORCH_FUSED
    skip_unless_available("optimizer", "reference" if of_pytorch else backend, device)
    lists = [tensors(device, seed) for seed in range(3)]
    parameters, gradients, teachers = lists
    if of_pytorch:
        work = of_torch(parameters, gradients, teachers)
    else:
        work = of_ours(parameters, gradients, teachers, backend)
    count = sum(x.numel() for x in lists[0])
    measure(
        benchmark,
        work,
        op="optimizer",
        backend=backend,
        dtype=torch.float32,
        shape=(len(SHAPES), count),
        mode="step",
        device=device,
        num_bytes=9 * 4 * count,  # reads five tensors of each shape, writes four
    )


@pytest.mark.parametrize("device", CASES)
@pytest.mark.parametrize("backend", ["reference", "torch foreach", "native", "triton"])
def test_gradient_norm(benchmark: Any, backend: str, device: str):
    of_pytorch = backend == "torch foreach"
    skip_unless_available("optimizer", "reference" if of_pytorch else backend, device)
    gradients = tensors(device, 0)

    def work() -> Tensor:
        if of_pytorch:
            return torch.nn.utils.get_total_norm(gradients, foreach=True)
        return gradient_norm(gradients, backend=backend)

    count = sum(x.numel() for x in gradients)
    measure(
        benchmark,
        work,
        op="optimizer",
        backend=backend,
        dtype=torch.float32,
        shape=(len(SHAPES), count),
        mode="norm",
        device=device,
        num_bytes=4 * count,
    )
