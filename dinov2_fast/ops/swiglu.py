"""SwiGLU: the gated activation between the two matrix products of a feed-forward layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.backends import choose_backend
from dinov2_fast.ops._checks import accumulation_dtype, check_device, check_tensor
from dinov2_fast.ops._declare import declare
from dinov2_fast.ops._native import new_native_partials, of_partials, run_native
from dinov2_fast.ops._native_cpu import NATIVE_DEVICES, adjacent_columns, dtype_name
from dinov2_fast.ops._triton import TRITON_DEVICES, device_of, why_not_rows


def swiglu_reference(x12: Tensor) -> Tensor:
    """`swiglu` in plain PyTorch: the specification."""
    x1, x2 = x12.chunk(2, dim=-1)
    return F.silu(x1) * x2  # [R, F]


def swiglu_backward_reference_(dh: Tensor, x12: Tensor) -> Tensor:
    """`swiglu_backward_` in plain PyTorch: the specification."""
    wide = accumulation_dtype(x12)
    x1, x2 = x12.to(wide).chunk(2, dim=-1)
    gradient, s = dh.to(wide), x1.sigmoid()
    dx12 = torch.cat([gradient * x2 * (s * (1 + x1 * (1 - s))), gradient * (x1 * s)], dim=1)
    dh.copy_(x1 * s * x2)
    x12.copy_(dx12)
    return dx12.sum(0)


def swiglu(x12: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(x1) * x2 of the two halves of each row; the first half is the gate.

    Args:
        x12: [R, 2F], any float dtype; rows may be strided.
        backend: one of `dinov2_fast.backends.BACKENDS`; None chooses.
    Returns:
        [R, F], the dtype of x12. Kernels compute in float32 and round once at the end.
    Raises:
        ValueError: x12 is not a matrix of an even width.
        TypeError: x12 does not hold floats.
        BackendUnavailable: the explicit backend cannot compute this.
    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    _check(x12)
    chosen = choose_backend(
        "swiglu", x12, backend, refusals=lambda name: why_not_rows(name, {"x12": x12})
    )
    if chosen == "reference":
        return swiglu_reference(x12)
    return _forward(x12, chosen)


def swiglu_backward_(dh: Tensor, x12: Tensor, *, backend: str | None = None) -> Tensor:
    """The backward pass in place, for a caller that owns both tensors.

    Args:
        dh: [R, F] gradient of the activation; becomes the activation swiglu(x12) itself.
        x12: [R, 2F] what the activation was computed of; becomes its gradient.
        backend: one of `dinov2_fast.backends.BACKENDS`; None chooses.
    Returns:
        [2F] float32 (float64 for float64 x12), the column sums of x12's gradient before it is
        rounded: the gradient of a bias that was added to x12.
    Raises:
        ValueError: the shapes, dtypes or devices differ.
        TypeError: not floats.
        BackendUnavailable: the explicit backend cannot compute this.
    """
    _check(x12)
    check_tensor("swiglu_backward_", "dh", dh, x12.shape[0], x12.shape[1] // 2)
    check_device("swiglu_backward_", x12.device, dh=dh)
    if dh.dtype != x12.dtype:
        raise ValueError(
            f"swiglu_backward_: dh must have the dtype of x12 {x12.dtype}, got {dh.dtype}"
        )
    matrices = {"x12": x12, "dh": dh}
    chosen = choose_backend(
        "swiglu", x12, backend, refusals=lambda name: why_not_rows(name, matrices)
    )
    if chosen == "reference":
        return swiglu_backward_reference_(dh, x12)
    sums = _launch_triton_(dh, x12) if chosen == "triton" else _launch_native_(dh, x12)
    torch.autograd.graph.increment_version((dh, x12))
    return sums


def _launch_native_(dh: Tensor, x12: Tensor) -> Tensor:
    """The backward in place by native kernels; the column sums."""
    partials = new_native_partials(x12)
    _launch_backward(dh, x12, dx12=x12, h=dh, partials=partials)
    return partials.sum(0)


def _launch_triton_(dh: Tensor, x12: Tensor) -> Tensor:
    """The backward in place by Triton; the column sums."""
    from dinov2_fast.kernels import swiglu as kernels

    with device_of(x12):
        sums = kernels.backward(dh, x12, x12, dh, want_sums=True)
    assert sums is not None
    return sums


def _check(x12: Tensor) -> None:
    """Refuse what is no [R, 2F] of floats."""
    check_tensor("swiglu", "x12", x12, "R", "2F")
    if x12.shape[1] % 2 != 0:
        raise ValueError(f"swiglu: x12 must have an even width 2F, got {x12.shape[1]}")


def _forward_native(x12: Tensor) -> Tensor:
    """Native forward."""
    rows, hidden = x12.shape[0], x12.shape[1] // 2
    h = x12.new_empty(rows, hidden)
    run_native(
        "swiglu_forward",
        x12=x12,
        h=h,
        rows=rows,
        hidden=hidden,
        x12_row_stride=x12.stride(0),
        h_row_stride=h.stride(0),
        dtype=dtype_name(x12),
    )
    return h


def _backward_native(dh: Tensor, x12: Tensor) -> Tensor:
    """Native backward into a new tensor."""
    dh, dx12 = adjacent_columns(dh), _empty_gradient(x12)
    _launch_backward(dh, x12, dx12=dx12, h=None, partials=None)
    return dx12


def _launch_backward(
    dh: Tensor, x12: Tensor, *, dx12: Tensor, h: Tensor | None, partials: Tensor | None
) -> None:
    """Write dx12 and, if wanted, h and the column sums of dx12 over each block of rows."""
    rows, width = x12.shape
    run_native(
        "swiglu_backward",
        dh=dh,
        x12=x12,
        dx12=dx12,
        h=h,
        **of_partials(x12, partials),
        rows=rows,
        hidden=width // 2,
        dh_row_stride=dh.stride(0),
        x12_row_stride=x12.stride(0),
        dx12_row_stride=dx12.stride(0),
        h_row_stride=0 if h is None else h.stride(0),
        dtype=dtype_name(x12),
    )


def _forward_triton(x12: Tensor) -> Tensor:
    """Forward by Triton."""
    from dinov2_fast.kernels import swiglu as kernels

    h = x12.new_empty(x12.shape[0], x12.shape[1] // 2)
    with device_of(x12):
        kernels.forward(x12, h)
    return h


def _backward_triton(dh: Tensor, x12: Tensor) -> Tensor:
    """Backward by Triton into a new tensor."""
    from dinov2_fast.kernels import swiglu as kernels

    dx12 = _empty_gradient(x12)
    with device_of(x12):
        kernels.backward(adjacent_columns(dh), x12, dx12, None, want_sums=False)
    return dx12


def _empty_gradient(x12: Tensor) -> Tensor:
    """Contiguous storage for the gradient of x12, whatever the strides of x12."""
    return x12.new_empty(x12.shape)


def _forward_fake(x12: Tensor) -> Tensor:
    return x12.new_empty(x12.shape[0], x12.shape[1] // 2)


def _backward_fake(dh: Tensor, x12: Tensor) -> Tensor:
    return _empty_gradient(x12)


def _setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    """Keep x12 alone: recomputing h costs less than reading it back."""
    x12, ctx.backend = inputs
    ctx.save_for_backward(x12)


def _gradient(ctx: Any, dh: Tensor) -> tuple[Tensor, None]:
    """Gradients of (x12, backend)."""
    (x12,) = ctx.saved_tensors
    return _backward(dh, x12, ctx.backend), None


_backward = declare(
    "swiglu_backward(Tensor dh, Tensor x12, str backend) -> Tensor",
    kernels={
        **dict.fromkeys(NATIVE_DEVICES, _backward_native),
        **dict.fromkeys(TRITON_DEVICES, _backward_triton),
    },
    fake=_backward_fake,
)
_forward = declare(
    "swiglu(Tensor x12, str backend) -> Tensor",
    kernels={
        **dict.fromkeys(NATIVE_DEVICES, _forward_native),
        **dict.fromkeys(TRITON_DEVICES, _forward_triton),
    },
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)
