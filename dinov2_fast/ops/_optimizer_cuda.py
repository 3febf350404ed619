"""The optimizer's CUDA kernels: one launch for lists of tensors, called as those of the CPU are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dinov2_fast.ops._native_cpu import dtype_name
from dinov2_fast.ops._native_cuda import run_cuda
from dinov2_fast.ops._optimizer_numbers import changing_numbers, known_numbers
from dinov2_fast.ops._optimizer_table import CHUNK, present, table_of


def _write(table: Tensor, numbers: tuple[int, ...]) -> None:
    """Numbers travel as parameters of a kernel: nothing is copied from memory of the host."""
    run_cuda("optimizer_table_cuda", table=table, numbers=numbers)


def norm(gradients: Sequence[Tensor]) -> Tensor:
    """0-d float32 norm of all gradients; squares are summed in float64, chunk by chunk."""
    table = table_of([gradients], chunk=CHUNK, write=_write)
    out = gradients[0].new_empty(())
    run_cuda(
        "optimizer_norm_cuda",
        reached=table.tensors,
        table=table.numbers,
        num_tensors=table.num_tensors,
        num_chunks=table.num_chunks,
        chunk=CHUNK,
        sums=out.new_empty(table.num_chunks, dtype=torch.float64),
        norm=out,
    )
    return out


def takes_copies(
    copies: Sequence[Tensor | None],
    ema_copies: Sequence[Tensor | None],
    ema_parameters: Sequence[Tensor] | None,
) -> bool:
    """Whether the kernel writes these copies in its own pass over memory."""
    del ema_parameters
    given = present([copies, ema_copies])
    dtypes = {copy.dtype for copy in given}
    types = dtypes <= {torch.bfloat16} or dtypes <= {torch.float16}
    return types and all(copy.is_contiguous() for copy in given)


def step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema_parameters: Sequence[Tensor] | None,
    *,
    gradient_scale: Tensor | float,
    skip: Tensor | None,
    copies: Sequence[Tensor | None] = (),
    ema_copies: Sequence[Tensor | None] = (),
    **numbers: Any,
) -> None:
    """The step of every parameter, in place; arguments as in `adamw_ema_step`."""
    none = [None] * len(parameters)
    states = [parameters, gradients, exp_avgs, exp_avg_sqs]
    lists = [*states, ema_parameters or none, copies or none, ema_copies or none]
    table = table_of(lists, chunk=CHUNK, write=_write)
    # Autograd does not see writes through pointers, and must refuse what saved the old values.
    written_copies = present([copies, ema_copies])
    increment_version([*parameters, *exp_avgs, *exp_avg_sqs, *(ema_parameters or ())])
    increment_version(written_copies)
    on_device = isinstance(gradient_scale, Tensor)
    run_cuda(
        "optimizer_step_cuda",
        reached=table.tensors,
        table=table.numbers,
        num_tensors=table.num_tensors,
        num_chunks=table.num_chunks,
        chunk=CHUNK,
        scale=gradient_scale if on_device else None,
        gradient_scale=1.0 if on_device else float(gradient_scale),
        skip=skip,
        copies_dtype=dtype_name(written_copies[0]) if written_copies else "bfloat16",
        changing=changing_numbers(parameters[0], **numbers),
        **known_numbers(numbers),
    )
