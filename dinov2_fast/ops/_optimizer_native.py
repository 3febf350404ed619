"""The optimizer's kernels on the CPU, and what they take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dinov2_fast import environment, native


def refusal(*, device: torch.device, **lists: Sequence[Tensor] | None) -> str:
    """Why kernels on a device cannot take these lists (argument name -> tensors), or ""."""
    for name, tensors in lists.items():
        for index, tensor in enumerate(tensors or ()):
            if tensor.dtype != torch.float32:
                dtype = str(tensor.dtype).removeprefix("torch.")
                return f"{name}[{index}] must be float32, got {dtype}"
            if tensor.device != device:
                return f"{name}[{index}] must be on {device}, got {tensor.device}"
            if tensor.layout != torch.strided or not tensor.is_contiguous():
                return f"{name}[{index}] must be contiguous; call .contiguous() or take None"
    return ""


def norm(gradients: Sequence[Tensor]) -> Tensor:
    """0-d float32 norm of all gradients; squares are summed in float64, chunk by chunk."""
    total = native.module().optimizer_norm_cpu(
        tensors=_pointers(gradients),
        sizes=[gradient.numel() for gradient in gradients],
        threads=torch.get_num_threads(),
        level=environment.cpu_level(),
    )
    return torch.tensor(total, dtype=torch.float32)


def takes_copies(
    copies: Sequence[Tensor | None],
    ema_copies: Sequence[Tensor | None],
    ema_parameters: Sequence[Tensor] | None,
) -> bool:
    """Whether the kernel writes these copies in its own pass over memory."""
    given = [copy for copy in (*copies, *ema_copies) if copy is not None]
    if any(copy.dtype != torch.bfloat16 or not copy.is_contiguous() for copy in given):
        return False
    if ema_parameters is None:
        return True
    return [copy is None for copy in copies] == [copy is None for copy in ema_copies]


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
    **numbers: float,
) -> None:
    """The step of every parameter, in place; arguments as in `adamw_ema_step`."""
    assert skip is None  # it can be read on the CPU, and the step left out altogether
    teachers = () if ema_parameters is None else ema_parameters
    # Autograd does not see writes through pointers, and must refuse what saved the old values.
    written = [copy for copy in (*copies, *ema_copies) if copy is not None]
    increment_version([*parameters, *exp_avgs, *exp_avg_sqs, *teachers, *written])
    native.module().optimizer_step_cpu(
        parameters=_pointers(parameters),
        gradients=_pointers(gradients),
        exp_avgs=_pointers(exp_avgs),
        exp_avg_sqs=_pointers(exp_avg_sqs),
        ema_parameters=_pointers(teachers),
        with_ema=ema_parameters is not None,
        copies=_pointers(copies),
        ema_copies=_pointers(ema_copies),
        sizes=[parameter.numel() for parameter in parameters],
        gradient_scale=float(gradient_scale),
        threads=torch.get_num_threads(),
        level=environment.cpu_level(),
        **numbers,
    )


def _pointers(tensors: Sequence[Tensor | None]) -> list[int]:
    """Address of the first element of each tensor; 0 for an empty one, and for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
