"""The optimizer's Triton kernels: one launch for lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dinov2_fast.ops._optimizer_numbers import changing_numbers, known_numbers
from dinov2_fast.ops._optimizer_table import CHUNK, Table, table_of

_BLOCK = 1024
_ALIGNMENT = 16  # bytes of a vector load


def _kernels() -> Any:
    """The module of kernels; typed loosely, as Triton's launches are."""
    from dinov2_fast.kernels import optimizer

    return optimizer


def _is_captured(table: Tensor) -> bool:
    """Whether what is done to a tensor now goes into a CUDA graph."""
    return table.is_cuda and torch.cuda.is_current_stream_capturing()


def _write(table: Tensor, numbers: tuple[int, ...]) -> None:
    """From pinned memory; into a captured graph as scalars of kernels, of which it has copies.

    Its replays would read the memory of the host again, which is somebody else's by then.
    """
    if _is_captured(table):
        places = list(table.zero_().unbind())
        torch._foreach_add_(places, list(numbers))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        return
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=table.is_cuda)
    table.copy_(host, non_blocking=True)


def norm(gradients: Sequence[Tensor]) -> Tensor:
    """0-d float32 norm of all gradients; chunks' sums are added in float64."""
    table = table_of([gradients], chunk=CHUNK, write=_write)
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
    gradient_scale: Tensor | float,
    skip: Tensor | None,
    **numbers: Any,
) -> None:
    """The step of every parameter, in place; arguments as in `adamw_ema_step`."""
    # Autograd does not see writes through pointers, and must refuse what saved the old values.
    written = [*parameters, *exp_avgs, *exp_avg_sqs]
    increment_version(written if ema_parameters is None else [*written, *ema_parameters])
    teachers = [None] * len(parameters) if ema_parameters is None else ema_parameters
    lists = [parameters, gradients, exp_avgs, exp_avg_sqs, teachers]
    table = table_of(lists, chunk=CHUNK, write=_write)
    if not table.num_chunks:
        return
    changing = changing_numbers(parameters[0], **numbers)
    scale = gradient_scale if isinstance(gradient_scale, Tensor) else table.numbers
    known = known_numbers(numbers)
    lr, beta1, beta2, count = (known[name] for name in ("lr", "beta1", "beta2", "step"))
    _kernels().step_kernel[(table.num_chunks,)](
        table.numbers,
        scale,
        scale if skip is None else skip,
        scale if changing is None else changing,
        1.0 if isinstance(gradient_scale, Tensor) else float(gradient_scale),
        float(1 - lr * known["weight_decay"]),
        1 - beta1,
        float(beta2),
        1 - beta2,
        float(known["eps"]),
        float(lr / (1 - beta1**count)),
        (1 - beta2**count) ** -0.5,
        1 - float(known["momentum"]),
        table.num_tensors,
        HAS_SCALE=isinstance(gradient_scale, Tensor),
        HAS_SKIP=skip is not None,
        HAS_CHANGING=changing is not None,
        HAS_TEACHER=ema_parameters is not None,
        ALIGNED=_aligned(table),
        CHUNK=CHUNK,
        BLOCK=_BLOCK,
    )


def _aligned(table: Table) -> bool:
    """Whether all tensors can be moved in vectors."""
    return all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in table.tensors)
