"""The native kernels of stochastic depth, and the ops that torch knows all kernels as."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinov2_fast.ops._declare import Kernel, declare
from dinov2_fast.ops._native_cpu import (
    BLOCK_ROWS,
    NATIVE_DEVICES,
    adjacent_columns,
    dtype_name,
    in_float32,
    new_partials,
    on_cuda,
    run_cpu,
)
from dinov2_fast.ops._stochastic_depth_cuda import gather_cuda, scatter_cuda_
from dinov2_fast.ops._stochastic_depth_triton import gather_triton, scatter_triton_
from dinov2_fast.ops._triton import TRITON_DEVICES


def scatter_native_(
    x: Tensor,
    residual: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    gamma: Tensor | None,
    *,
    op: str,
) -> None:
    """x[rows] += residual * row_scale * gamma; `op` is named if a row is out of range."""
    if x.shape[1] == 0:
        return
    if on_cuda(x):
        scatter_cuda_(x, residual, rows, row_scale, gamma)
        return
    run_cpu(
        "stochastic_depth_forward_cpu",
        x=x,
        residual=residual,
        rows=rows,
        row_scale=row_scale,
        gamma=_ones_or(gamma, x),
        num_x_rows=x.shape[0],
        num_rows=residual.shape[0],
        channels=x.shape[1],
        x_row_stride=x.stride(0),
        residual_row_stride=residual.stride(0),
        x_dtype=dtype_name(x),
        residual_dtype=dtype_name(residual),
        op=op,
    )


def gather_native(
    dx: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    gamma: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    *,
    want_sums: bool,
    op: str,
) -> tuple[Tensor, Tensor | None]:
    """Rows g = dx[rows] * row_scale * gamma, and the sums [C] of dx[rows] * row_scale * residual.

    Args:
        dx: [T, C].
        rows: [R], or all.
        row_scale: [R], or ones.
        gamma: [C], or ones.
        residual: [R, C] in out_dtype, or ones.
        out_dtype: of g.
        want_sums: whether to compute the sums.
        op: named if a row is out of range.
    Returns:
        g [R, C], and the sums in float32 if wanted.
    """
    if on_cuda(dx):
        return gather_cuda(dx, rows, row_scale, gamma, residual, out_dtype, want_sums=want_sums)
    num_rows, channels = (dx if rows is None else rows).shape[0], dx.shape[1]
    g = dx.new_empty((num_rows, channels), dtype=out_dtype)
    sums = dx.new_empty(channels, dtype=torch.float32) if want_sums else None
    if channels == 0:
        return g, sums
    run_cpu(
        "stochastic_depth_backward_cpu",
        dx=dx,
        residual=residual,
        rows=rows,
        row_scale=row_scale,
        gamma=_ones_or(gamma, dx),
        g=g,
        partials=new_partials(dx, num_rows, channels) if want_sums else None,
        sums=sums,
        num_dx_rows=dx.shape[0],
        num_rows=num_rows,
        channels=channels,
        block_rows=BLOCK_ROWS,
        dx_row_stride=dx.stride(0),
        residual_row_stride=0 if residual is None else residual.stride(0),
        g_row_stride=g.stride(0),
        dx_dtype=dtype_name(dx),
        g_dtype=dtype_name(g),
        op=op,
    )
    return g, sums


def _ones_or(gamma: Tensor | None, like: Tensor) -> Tensor:
    """Gamma in float32: C numbers, nothing beside the rows."""
    return like.new_ones(like.shape[1], dtype=torch.float32) if gamma is None else in_float32(gamma)


def _scatter_by(run: Kernel) -> Kernel:
    """A copy of x, added to in place."""

    def scatter(
        x: Tensor, residual: Tensor, rows: Tensor, row_scale: Tensor, gamma: Tensor | None
    ) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        run(out, residual, rows, row_scale, gamma, op="scatter_add_scaled")
        return out

    return scatter


def _scatter_fake(
    x: Tensor, residual: Tensor, rows: Tensor, row_scale: Tensor, gamma: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape)


def _scatter_backward_by(run: Kernel) -> Kernel:
    """Gradients of residual, and of gamma in float32 (nothing of it without a gamma)."""

    def backward(
        grad: Tensor, residual: Tensor, rows: Tensor, row_scale: Tensor, gamma: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        wants_gamma = gamma is not None
        dresidual, dgamma = run(
            adjacent_columns(grad),
            rows,
            row_scale,
            gamma,
            residual if wants_gamma else None,
            residual.dtype,
            want_sums=wants_gamma,
            op="scatter_add_scaled_backward",
        )
        return dresidual, grad.new_empty(0, dtype=torch.float32) if dgamma is None else dgamma

    return backward


def _scatter_backward_fake(
    grad: Tensor, residual: Tensor, rows: Tensor, row_scale: Tensor, gamma: Tensor | None
) -> tuple[Tensor, Tensor]:
    channels = 0 if gamma is None else grad.shape[1]
    dgamma = grad.new_empty(channels, dtype=torch.float32)
    return residual.new_empty(residual.shape), dgamma


def _scatter_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, residual, rows, row_scale, gamma, ctx.backend = inputs
    ctx.save_for_backward(residual, rows, row_scale, gamma)


def _scatter_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of (x, residual, rows, row_scale, gamma, backend)."""
    residual, rows, row_scale, gamma = ctx.saved_tensors
    dresidual, dgamma = _scatter_backward(grad, residual, rows, row_scale, gamma, ctx.backend)
    return grad, dresidual, None, None, None if gamma is None else dgamma.to(gamma.dtype), None


def _gather_by(run: Kernel) -> Kernel:
    """The rows alone."""

    def gather(x: Tensor, rows: Tensor) -> Tensor:
        return run(x, rows, None, None, None, x.dtype, want_sums=False, op="gather_rows")[0]

    return gather


def _gather_fake(x: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(rows.shape[0], x.shape[1])


def _gather_setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    x, rows, _ = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(rows)


def _gather_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """Gradients of (x, rows, backend); a row may have been gathered twice."""
    (rows,) = ctx.saved_tensors
    return grad.new_zeros(ctx.shape).index_add(0, rows, grad), None, None


_scatter_backward = declare(
    "scatter_add_scaled_backward(Tensor grad, Tensor residual, Tensor rows, Tensor row_scale, "
    "Tensor? gamma, str backend) -> (Tensor, Tensor)",
    kernels={
        **dict.fromkeys(NATIVE_DEVICES, _scatter_backward_by(gather_native)),
        **dict.fromkeys(TRITON_DEVICES, _scatter_backward_by(gather_triton)),
    },
    fake=_scatter_backward_fake,
)
scatter_op = declare(
    "scatter_add_scaled(Tensor x, Tensor residual, Tensor rows, Tensor row_scale, Tensor? gamma, "
    "str backend) -> Tensor",
    kernels={
        **dict.fromkeys(NATIVE_DEVICES, _scatter_by(scatter_native_)),
        **dict.fromkeys(TRITON_DEVICES, _scatter_by(scatter_triton_)),
    },
    fake=_scatter_fake,
    setup_context=_scatter_setup_context,
    backward=_scatter_gradient,
)
gather_op = declare(
    "gather_rows(Tensor x, Tensor rows, str backend) -> Tensor",
    kernels={
        **dict.fromkeys(NATIVE_DEVICES, _gather_by(gather_native)),
        **dict.fromkeys(TRITON_DEVICES, _gather_by(gather_triton)),
    },
    fake=_gather_fake,
    setup_context=_gather_setup_context,
    backward=_gather_gradient,
)
