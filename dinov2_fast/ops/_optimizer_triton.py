"""The optimizer's Triton kernels: one launch for lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dinov2_fast.ops._optimizer_table import CHUNK, Table, table_of

_BLOCK = 1024
_ALIGNMENT = 16  # bytes of a vector load


def _kernels() -> Any:
    """The module of kernels; typed loosely, as Triton's launches are."""
    from dinov2_fast.kernels import optimizer

    return optimizer


def norm(gradients: Sequence[Tensor]) -> Tensor:
    """0-d float32 norm of all gradients; chunks' sums are added in float64."""
    table = table_of([gradients], chunk=CHUNK)
    sums = torch.empty(table.num_chunks, device=gradients[0].device)
    if table.num_chunks:
        _kernels().squares_kernel[(table.num_chunks,)](
            table.numbers,
            sums,
            table.num_tensors,
            ALIGNED=_aligned(table),
            CHUNK=CHUNK,
            BLOCK=_BLOCK,
        )
    # The root last: a sum that overflows float32 must be inf, as each chunk's is.
    return sums.sum(dtype=torch.float64).float().sqrt()


def step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema_parameters: Sequence[Tensor] | None,
    *,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    momentum: float,
    gradient_scale: Tensor | float,
    skip: Tensor | None,
) -> None:
    """The step of every parameter, in place; arguments as in `adamw_ema_step`."""
    # Autograd does not see writes through pointers, and must refuse what saved the old values.
    written = [*parameters, *exp_avgs, *exp_avg_sqs]
    increment_version(written if ema_parameters is None else [*written, *ema_parameters])
    teachers = [None] * len(parameters) if ema_parameters is None else ema_parameters
    table = table_of([parameters, gradients, exp_avgs, exp_avg_sqs, teachers], chunk=CHUNK)
    if not table.num_chunks:
        return
    has_scale = isinstance(gradient_scale, Tensor)
    scale = gradient_scale if isinstance(gradient_scale, Tensor) else table.numbers
    _kernels().step_kernel[(table.num_chunks,)](
        table.numbers,
        scale,
        scale if skip is None else skip,
        1.0 if isinstance(gradient_scale, Tensor) else float(gradient_scale),
        1 - lr * weight_decay,
        1 - beta1,
        float(beta2),
        1 - beta2,
        float(eps),
        lr / (1 - beta1**step),
        (1 - beta2**step) ** -0.5,
        1 - float(momentum),
        table.num_tensors,
        HAS_SCALE=has_scale,
        HAS_SKIP=skip is not None,
        HAS_TEACHER=ema_parameters is not None,
        ALIGNED=_aligned(table),
        CHUNK=CHUNK,
        BLOCK=_BLOCK,
    )


def _aligned(table: Table) -> bool:
    """Whether all tensors can be moved in vectors."""
    return all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in table.tensors)
