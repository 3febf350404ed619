"""GELU: the activation between the two matrix products of a plain feed-forward layer."""

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


def gelu_reference(x: Tensor) -> Tensor:
    """`gelu` in plain PyTorch: the specification."""
    return F.gelu(x)


def gelu_backward_reference_(da: Tensor, x: Tensor) -> Tensor:
    """`gelu_backward_` in plain PyTorch: the specification."""
    wide = accumulation_dtype(x)
    dx = torch.ops.aten.gelu_backward(da.to(wide), x.to(wide))  # [R, F]
    da.copy_(F.gelu(x))
    x.copy_(dx)
    return dx.sum(0)


def gelu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """X * Phi(x), Phi the normal distribution function itself and no approximation by tanh.

    Args:
        x: [R, F], any float dtype; rows may be strided.
        backend: one of `dinov2_fast.backends.BACKENDS`; None chooses.
    Returns:
        [R, F], the dtype of x. Kernels compute in float32 and round once at the end.
    Raises:
        ValueError: x is not a matrix.
        TypeError: x does not hold floats.
        BackendUnavailable: the explicit backend cannot compute this.
    Source: Hendrycks, Gimpel, "Gaussian error linear units", 2016.
    """
    check_tensor("gelu", "x", x, "R", "F")
    chosen = choose_backend("gelu", x, backend, refusals=lambda name: why_not_rows(name, {"x": x}))
    return gelu_reference(x) if chosen == "reference" else _forward(x, chosen)


def gelu_backward_(da: Tensor, x: Tensor, *, backend: str | None = None) -> Tensor:
    """The backward pass in place, for a caller that owns both tensors.

    Args:
        da: [R, F] gradient of the activation; becomes the activation gelu(x) itself.
        x: [R, F] what the activation was computed of; becomes its gradient.
        backend: one of `dinov2_fast.backends.BACKENDS`; None chooses.
    Returns:
        [F] float32 (float64 for float64 x), the column sums of x's gradient before it is rounded:
        the gradient of a bias that was added to x.
    Raises:
        ValueError: the shapes, dtypes or devices differ.
        TypeError: not floats.
        BackendUnavailable: the explicit backend cannot compute this.
    """
    check_tensor("gelu_backward_", "x", x, "R", "F")
    check_tensor("gelu_backward_", "da", da, *x.shape)
    check_device("gelu_backward_", x.device, da=da)
    if da.dtype != x.dtype:
        raise ValueError(f"gelu_backward_: da must have the dtype of x {x.dtype}, got {da.dtype}")
    matrices = {"x": x, "da": da}
    chosen = choose_backend("gelu", x, backend, refusals=lambda name: why_not_rows(name, matrices))
    if chosen == "reference":
        return gelu_backward_reference_(da, x)
    sums = _launch_triton_(da, x) if chosen == "triton" else _launch_native_(da, x)
    torch.autograd.graph.increment_version((da, x))
    return sums


def _launch_native_(da: Tensor, x: Tensor) -> Tensor:
    """The backward in place by native kernels; the column sums."""
    partials = new_native_partials(x)
    _launch_backward(da, x, dx=x, activation=da, partials=partials)
    return partials.sum(0)


def _launch_triton_(da: Tensor, x: Tensor) -> Tensor:
    """The backward in place by Triton; the column sums."""
    from dinov2_fast.kernels import gelu as kernels

    with device_of(x):
        sums = kernels.backward(da, x, x, da, want_sums=True)
    assert sums is not None
    return sums


def _forward_native(x: Tensor) -> Tensor:
    """Native forward."""
    a = x.new_empty(x.shape)
    run_native(
        "gelu_forward",
        x=x,
        a=a,
        rows=x.shape[0],
        width=x.shape[1],
        x_row_stride=x.stride(0),
        a_row_stride=a.stride(0),
        dtype=dtype_name(x),
    )
    return a


def _backward_native(da: Tensor, x: Tensor) -> Tensor:
    """Native backward into a new tensor."""
    dx = x.new_empty(x.shape)
    _launch_backward(adjacent_columns(da), x, dx=dx, activation=None, partials=None)
    return dx


def _forward_triton(x: Tensor) -> Tensor:
    """Forward by Triton."""
    from dinov2_fast.kernels import gelu as kernels

    a = x.new_empty(x.shape)
    with device_of(x):
        kernels.forward(x, a)
    return a


def _backward_triton(da: Tensor, x: Tensor) -> Tensor:
    """Backward by Triton into a new tensor."""
    from dinov2_fast.kernels import gelu as kernels

    dx = x.new_empty(x.shape)
    with device_of(x):
        kernels.backward(adjacent_columns(da), x, dx, None, want_sums=False)
    return dx


def _launch_backward(
    da: Tensor, x: Tensor, *, dx: Tensor, activation: Tensor | None, partials: Tensor | None
) -> None:
    """Write dx and, if wanted, gelu(x) and the column sums of dx over each block of rows."""
    rows, width = x.shape
    run_native(
        "gelu_backward",
        da=da,
        x=x,
        dx=dx,
        activation=activation,
        **of_partials(x, partials),
        rows=rows,
        width=width,
        da_row_stride=da.stride(0),
        x_row_stride=x.stride(0),
        dx_row_stride=dx.stride(0),
        activation_row_stride=0 if activation is None else activation.stride(0),
        dtype=dtype_name(x),
    )


def _forward_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(da: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    """Keep x alone."""
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _gradient(ctx: Any, da: Tensor) -> tuple[Tensor, None]:
    """Gradients of (x, backend)."""
    (x,) = ctx.saved_tensors
    return _backward(da, x, ctx.backend), None


_backward = declare(
    "gelu_backward(Tensor da, Tensor x, str backend) -> Tensor",
    kernels={
        **dict.fromkeys(NATIVE_DEVICES, _backward_native),
        **dict.fromkeys(TRITON_DEVICES, _backward_triton),
    },
    fake=_backward_fake,
)
_forward = declare(
    "gelu(Tensor x, str backend) -> Tensor",
    kernels={
        **dict.fromkeys(NATIVE_DEVICES, _forward_native),
        **dict.fromkeys(TRITON_DEVICES, _forward_triton),
    },
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)
