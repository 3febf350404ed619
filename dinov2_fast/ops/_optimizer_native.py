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


def norm_cpu(gradients: Sequence[Tensor]) -> Tensor:
    """0-d float32 norm of all gradients; squares are summed in float64, chunk by chunk."""
    norm = native.module().optimizer_norm_cpu(
        tensors=_pointers(gradients),
        sizes=[gradient.numel() for gradient in gradients],
        threads=torch.get_num_threads(),
        level=environment.cpu_level(),
    )
    return torch.tensor(norm, dtype=torch.float32)


def step_cpu(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema_parameters: Sequence[Tensor] | None,
    *,
    gradient_scale: Tensor | float,
    **numbers: float,
) -> None:
    """The step of every parameter, in place; arguments as in `adamw_ema_step`."""
    teachers = () if ema_parameters is None else ema_parameters
    # Autograd does not see writes through pointers, and must refuse what saved the old values.
    increment_version([*parameters, *exp_avgs, *exp_avg_sqs, *teachers])
    native.module().optimizer_step_cpu(
        parameters=_pointers(parameters),
        gradients=_pointers(gradients),
        exp_avgs=_pointers(exp_avgs),
        exp_avg_sqs=_pointers(exp_avg_sqs),
        ema_parameters=_pointers(teachers),
        with_ema=ema_parameters is not None,
        sizes=[parameter.numel() for parameter in parameters],
        gradient_scale=float(gradient_scale),
        threads=torch.get_num_threads(),
        level=environment.cpu_level(),
        **numbers,
    )


def _pointers(tensors: Sequence[Tensor]) -> list[int]:
    """Address of the first element of each tensor; 0 for an empty one."""
    return [tensor.data_ptr() for tensor in tensors]
