"""One optimizer step over lists of tensors: gradient norm and clipping, AdamW, teacher EMA.

Nothing here waits for the device: norms, clip coefficients and the decision to skip a step stay
0-d tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.backends import choose_backend
from dinov2_fast.ops import _optimizer_cuda, _optimizer_native, _optimizer_triton
from dinov2_fast.ops._checks import accumulation_dtype, check_positive
from dinov2_fast.ops._native_cpu import on_cuda
from dinov2_fast.ops._optimizer_native import refusal
from dinov2_fast.ops._optimizer_numbers import Number, read_by_host


def adamw_ema_reference(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema_parameter: Tensor | None,
    *,
    lr: Number,
    weight_decay: Number,
    beta1: float,
    beta2: float,
    eps: float,
    step: Number,
    momentum: Number,
    gradient_scale: Number,
    skip: Tensor | None,
) -> None:
    """The step of one parameter, in place, with one temporary; arguments as in `adamw_ema_step`.

    A skipped step multiplies every change by 0 and first overwrites what need not be finite.
    """
    keep = 1.0 if skip is None else skip.logical_not().to(parameter.dtype)
    scratch = gradient * gradient_scale
    if skip is not None:
        scratch.masked_fill_(skip, 0.0)
    exp_avg.lerp_(scratch, (1 - beta1) * keep)
    exp_avg_sq.mul_(1 - (1 - beta2) * keep).addcmul_(scratch, scratch, value=1 - beta2)
    torch.sqrt(exp_avg_sq, out=scratch)
    scratch.div_((1 - beta2**step) ** 0.5).add_(eps)
    if skip is not None:
        scratch.masked_fill_(skip, torch.inf)
    parameter.mul_(1 - lr * weight_decay * keep)
    rate = lr / (1 - beta1**step)
    if isinstance(rate, Tensor):  # which addcdiv_ would wait for
        parameter.sub_(torch.div(exp_avg, scratch, out=scratch).mul_(rate))
    else:
        parameter.addcdiv_(exp_avg, scratch, value=-rate)
    if ema_parameter is not None:
        share = (1 - momentum) * keep
        share = share.to(parameter.dtype) if isinstance(share, Tensor) else share
        ema_parameter.lerp_(parameter, share)


@torch.no_grad()
def gradient_norm(gradients: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """Euclidean norm of all gradients taken as one vector.

    Args:
        gradients: tensors of any shapes on one device.
        backend: see `backends.choose_backend`.
    Returns:
        A 0-d float32 tensor (float64 for float64 gradients) on their device; NaN or inf if any
        gradient is, or if the sum of squares overflows that type; 0 for no gradients. The native
        kernel sums float32 squares in float64.
    Raises:
        TypeError: gradients not floating-point.
        BackendUnavailable: the explicit backend cannot compute this call.
    """
    if not gradients:
        return torch.zeros(())
    for gradient in gradients:
        if not gradient.is_floating_point():
            raise TypeError(
                f"gradient_norm: gradients must be of a floating-point type, got {gradient.dtype}"
            )
    refusals = _refusals(gradients[0], "", gradients=gradients)
    chosen = choose_backend("optimizer", gradients[0], backend, refusals=refusals)
    if chosen == "native":
        kernels = _optimizer_cuda if on_cuda(gradients[0]) else _optimizer_native
        return kernels.norm(gradients)
    if chosen == "triton":
        return _optimizer_triton.norm(gradients)
    dtype = accumulation_dtype(*gradients)
    norms = [_norm(gradient, dtype) for gradient in gradients]
    return _norm(torch.stack(norms), dtype)


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Factor that brings gradients of a norm to at most another one: min(1, max / (norm + 1e-6)).

    Args:
        norm: 0-d, from `gradient_norm`.
        max_norm: norm that is allowed.
    Returns:
        0-d, in (0, 1]; NaN for a norm that is NaN.
    Raises:
        ValueError: norm is not 0-d, or max_norm <= 0.
    Source: torch.nn.utils.clip_grad_norm_, which DINOv2 calls once per sub-network.
    """
    if norm.ndim != 0:
        raise ValueError(f"clip_coefficient: norm must have shape [], got {tuple(norm.shape)}")
    check_positive("clip_coefficient", max_norm=max_norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def adamw_ema_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema_parameters: Sequence[Tensor] | None,
    *,
    lr: Number,
    weight_decay: Number,
    beta1: float,
    beta2: float,
    eps: float,
    step: Number,
    momentum: Number,
    gradient_scale: Number = 1.0,
    skip: Tensor | None = None,
    copies: Sequence[Tensor | None] = (),
    ema_copies: Sequence[Tensor | None] = (),
    backend: str | None = None,
) -> None:
    """AdamW with decoupled decay, then the teacher's moving average, all in place.

    With g = gradient * gradient_scale: m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2,
    p = p (1 - lr weight_decay) - lr m' / (sqrt(v') + eps) with the bias-corrected m', v', and
    ema = momentum ema + (1 - momentum) p.

    A CUDA graph may capture it. Replays work on the tensors of the capture and with its numbers;
    only what a tensor on the GPU says is read anew, so lr, weight_decay, step and momentum may be
    0-d ones: what torch's optimizers call capturable.

    Args:
        parameters: p, changed in place.
        gradients: of the same shapes; not changed.
        exp_avgs: m, changed in place; zeros before the first step.
        exp_avg_sqs: v, changed in place; zeros before the first step.
        ema_parameters: the teacher's parameters, changed in place; None has no teacher.
        lr: learning rate of this step; a 0-d tensor on the GPU is read there, without a check of
            its range, and one on the CPU at once.
        weight_decay: decay of this step, per unit of learning rate; or a tensor, as lr.
        beta1: decay of m.
        beta2: decay of v.
        eps: added to the root of v'.
        step: number of this step, from 1, for the bias correction; or a tensor, as lr.
        momentum: of the moving average, in [0, 1]; or a tensor, as lr.
        gradient_scale: factor on the gradients, for instance the clip coefficient; a 0-d tensor is
            read on the device.
        skip: 0-d bool; where it is true nothing changes, whatever the gradients hold. None is
            false.
        copies: p in another type, for matrix products, written anew; one per parameter, None for a
            parameter without, or empty.
        ema_copies: the teacher's, where `copies` has one.
        backend: see `backends.choose_backend`.
    Raises:
        TypeError: skip not bool, a number not 0-d, copies not floating-point.
        ValueError: lists of different length, shapes, dtypes or devices; a number out of range.
        BackendUnavailable: the explicit backend cannot compute this call.
    Source: Loshchilov, Hutter, "Decoupled weight decay regularization", 2019.
    """
    _check_lists(parameters, gradients, exp_avgs, exp_avg_sqs, ema_parameters)
    changing = {"lr": lr, "weight_decay": weight_decay, "step": step, "momentum": momentum}
    _check_scalars(skip, gradient_scale=gradient_scale, **changing)
    changing |= {"step": step.long() if isinstance(step, Tensor) else step}
    changing = {name: read_by_host(value) for name, value in changing.items()}
    _check_numbers(**changing, beta1=beta1, beta2=beta2, eps=eps)
    _check_copies(parameters, "copies", copies)
    _check_copies(parameters if ema_parameters is not None else (), "ema_copies", ema_copies)
    if not parameters:
        return
    refusals = _refusals(
        parameters[0],
        _scalar_refusal(parameters[0].device, gradient_scale, skip=skip, **changing),
        parameters=parameters,
        gradients=gradients,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        ema_parameters=ema_parameters,
    )
    chosen = choose_backend("optimizer", parameters[0], backend, refusals=refusals)
    if skip is not None and skip.device.type == "cpu":  # no device to wait for
        if bool(skip):
            return
        skip = None
    numbers: dict[str, Any] = {
        **changing,
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "gradient_scale": gradient_scale,
    }
    lists = (parameters, gradients, exp_avgs, exp_avg_sqs)
    if chosen == "native":
        kernels = _optimizer_cuda if on_cuda(parameters[0]) else _optimizer_native
        if kernels.takes_copies(copies, ema_copies, ema_parameters):
            numbers |= {"copies": copies, "ema_copies": ema_copies}
            copies = ema_copies = ()
        kernels.step(*lists, ema_parameters, **numbers, skip=skip)
    elif chosen == "triton":
        _optimizer_triton.step(*lists, ema_parameters, **numbers, skip=skip)
    else:
        for index, tensors in enumerate(zip(*lists, strict=True)):
            teacher = None if ema_parameters is None else ema_parameters[index]
            adamw_ema_reference(*tensors, teacher, **numbers, skip=skip)
    for sources, targets in ((parameters, copies), (ema_parameters or (), ema_copies)):
        for source, target in zip(sources, targets, strict=False):
            if target is not None:
                target.copy_(source)


def _refusals(first: Tensor, scalars: str, **lists: Sequence[Tensor] | None) -> dict[str, str]:
    """Why kernels cannot take these lists, or these scalars, as `choose_backend` wants it."""
    device = first.device
    return dict.fromkeys(("native", "triton"), refusal(device=device, **lists) or scalars)


def _norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Euclidean norm of all elements, summed in a dtype."""
    return torch.linalg.vector_norm(x, dtype=dtype)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _check_lists(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema_parameters: Sequence[Tensor] | None,
) -> None:
    """Refuse lists that do not describe the same parameters."""
    lists = {"gradients": gradients, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if ema_parameters is not None:
        lists["ema_parameters"] = ema_parameters
    for name, tensors in lists.items():
        if len(tensors) != len(parameters):
            raise ValueError(
                f"adamw_ema_step: {name} must have one tensor for each of the {len(parameters)} "
                f"parameters, got {len(tensors)}"
            )
        for index, (tensor, parameter) in enumerate(zip(tensors, parameters, strict=True)):
            wanted = (tuple(parameter.shape), parameter.dtype, parameter.device)
            got = (tuple(tensor.shape), tensor.dtype, tensor.device)
            if got != wanted:
                raise ValueError(
                    f"adamw_ema_step: {name}[{index}] must have shape, dtype and device "
                    f"{wanted} of its parameter, got {got}"
                )


def _check_copies(parameters: Sequence[Tensor], name: str, copies: Sequence[Tensor | None]) -> None:
    """Refuse copies that are not one per parameter, of its shape and on its device."""
    if len(copies) not in (0, len(parameters)):
        raise ValueError(
            f"adamw_ema_step: {name} must have one tensor or None for each of the "
            f"{len(parameters)} parameters, or none at all, got {len(copies)}"
        )
    for index, (copy, parameter) in enumerate(zip(copies, parameters, strict=False)):
        if copy is None:
            continue
        if not copy.is_floating_point():
            raise TypeError(
                f"adamw_ema_step: {name}[{index}] must be of a floating-point type, "
                f"got {copy.dtype}"
            )
        if copy.shape != parameter.shape or copy.device != parameter.device:
            raise ValueError(
                f"adamw_ema_step: {name}[{index}] must have shape and device "
                f"{(tuple(parameter.shape), parameter.device)} of its parameter, "
                f"got {(tuple(copy.shape), copy.device)}"
            )


def _check_numbers(*, beta1: float, beta2: float, eps: float, **changing: Number) -> None:
    """Refuse numbers out of range, of those that are not on the device."""
    known = {name: x for name, x in changing.items() if not isinstance(x, Tensor)}
    for name in ("lr", "weight_decay"):
        if not known.get(name, 0) >= 0:
            raise ValueError(f"adamw_ema_step: {name} must be at least 0, got {known[name]}")
    for name, value in {"beta1": beta1, "beta2": beta2}.items():
        if not 0 <= value < 1:
            raise ValueError(f"adamw_ema_step: {name} must be in [0, 1), got {value}")
    if not 0 <= known.get("momentum", 0) <= 1:
        raise ValueError(f"adamw_ema_step: momentum must be in [0, 1], got {known['momentum']}")
    if known.get("step", 1) < 1:
        raise ValueError(f"adamw_ema_step: step must be at least 1, got {known['step']}")
    check_positive("adamw_ema_step", eps=eps)


def _scalar_refusal(device: torch.device, gradient_scale: Number, **others: Number | None) -> str:
    """Why kernels on a device cannot read these numbers, or ""."""
    for name, value in {"gradient_scale": gradient_scale, **others}.items():
        if isinstance(value, Tensor) and value.device != device:
            return f"{name} must be on {device}, got {value.device}"
    if isinstance(gradient_scale, Tensor) and gradient_scale.dtype != torch.float32:
        return f"gradient_scale must be float32, got {gradient_scale.dtype}"
    return ""


def _check_scalars(skip: Tensor | None, **numbers: Number) -> None:
    """Refuse tensors that are not the 0-d ones they must be."""
    for name, value in numbers.items():
        if isinstance(value, Tensor) and value.ndim != 0:
            raise TypeError(
                f"adamw_ema_step: {name} must be a number or of shape [], got {tuple(value.shape)}"
            )
    if skip is not None and (skip.dtype != torch.bool or skip.ndim != 0):
        raise TypeError(
            f"adamw_ema_step: skip must be bool of shape [], got {skip.dtype} {tuple(skip.shape)}"
        )
