"""The optimizer's Triton kernels: one launch for lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

_BLOCK = 1024
_ALIGNMENT = 16  # bytes of a vector load


@dataclass(frozen=True)
class _Table:
    """Where the tensors lie, on their device."""

    addresses: Tensor
    """[lists, N] int64."""
    sizes: Tensor
    """[N] int64."""
    chunks: Tensor
    """[2, programs] int64."""
    num_programs: int
    aligned: bool


def _kernels() -> Any:
    """The module of kernels; typed loosely, as Triton's launches are."""
    from dinov2_fast.kernels import optimizer

    return optimizer


def norm(gradients: Sequence[Tensor]) -> Tensor:
    """0-d float32 norm of all gradients; chunks' sums are added in float64."""
    kernels = _kernels()

    table = _table([gradients], chunk=kernels.CHUNK)
    sums = torch.empty(table.num_programs, device=gradients[0].device)
    if table.num_programs:
        kernels.squares_kernel[(table.num_programs,)](
            table.addresses,
            table.sizes,
            table.chunks,
            sums,
            table.num_programs,
            ALIGNED=table.aligned,
            CHUNK=kernels.CHUNK,
            BLOCK=_BLOCK,
        )
    return sums.sum(dtype=torch.float64).sqrt().float()


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
    kernels = _kernels()

    teachers = parameters if ema_parameters is None else ema_parameters
    # Autograd does not see writes through pointers, and must refuse what saved the old values.
    written = [*parameters, *exp_avgs, *exp_avg_sqs]
    increment_version(written if ema_parameters is None else [*written, *ema_parameters])
    lists = [parameters, gradients, exp_avgs, exp_avg_sqs, teachers]
    table = _table(lists, chunk=kernels.CHUNK)
    if not table.num_programs:
        return
    has_scale = isinstance(gradient_scale, Tensor)
    scale = gradient_scale if isinstance(gradient_scale, Tensor) else table.addresses
    kernels.step_kernel[(table.num_programs,)](
        table.addresses,
        table.sizes,
        table.chunks,
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
        len(parameters),
        table.num_programs,
        HAS_SCALE=has_scale,
        HAS_SKIP=skip is not None,
        HAS_TEACHER=ema_parameters is not None,
        ALIGNED=table.aligned,
        CHUNK=kernels.CHUNK,
        BLOCK=_BLOCK,
    )


def _table(lists: Sequence[Sequence[Tensor]], *, chunk: int) -> _Table:
    """The table of lists of tensors of the same sizes, copied to their device at once."""
    sizes = [tensor.numel() for tensor in lists[0]]
    pieces = [-(-size // chunk) for size in sizes]
    addresses = [tensor.data_ptr() for tensors in lists for tensor in tensors]
    tensor_of = [index for index, count in enumerate(pieces) for _ in range(count)]
    piece_of = [piece for count in pieces for piece in range(count)]
    numbers = torch.tensor([*addresses, *sizes, *tensor_of, *piece_of], dtype=torch.int64)
    on_device = numbers.to(lists[0][0].device, non_blocking=True)
    last = len(addresses) + len(sizes)
    return _Table(
        addresses=on_device[: len(addresses)],
        sizes=on_device[len(addresses) : last],
        chunks=on_device[last:],
        num_programs=len(tensor_of),
        aligned=all(address % _ALIGNMENT == 0 for address in addresses),
    )
