"""The CUDA kernels of stochastic depth, called as `_stochastic_depth_native` calls the CPU's."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast.ops._native_cpu import dtype_name
from dinov2_fast.ops._native_cuda import new_cuda_partials, run_cuda


def scatter_cuda_(
    x: Tensor,
    residual: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    gamma: Tensor | None,
) -> None:
    """x[rows] += residual * row_scale * gamma; nothing looks at the numbers of `rows`."""
    run_cuda(
        "stochastic_depth_scatter_cuda",
        x=x,
        residual=residual,
        rows=rows,
        row_scale=row_scale,
        gamma=None if gamma is None else gamma.float(),
        num_rows=residual.shape[0],
        channels=x.shape[1],
        x_row_stride=x.stride(0),
        residual_row_stride=residual.stride(0),
        x_dtype=dtype_name(x),
        residual_dtype=dtype_name(residual),
    )


def gather_cuda(
    dx: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    gamma: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    *,
    want_sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """Rows g = dx[rows] * row_scale * gamma, and the sums [C] of dx[rows] * row_scale * residual.

    Arguments and results are those of `gather_native`.
    """
    num_rows, channels = (dx if rows is None else rows).shape[0], dx.shape[1]
    g = dx.new_empty((num_rows, channels), dtype=out_dtype)
    partials = new_cuda_partials(dx, num_rows, channels) if want_sums else None
    run_cuda(
        "stochastic_depth_gather_cuda",
        dx=dx,
        residual=residual,
        rows=rows,
        row_scale=row_scale,
        gamma=None if gamma is None else gamma.float(),
        g=g,
        partials=partials,
        num_partials=0 if partials is None else partials.shape[0],
        num_rows=num_rows,
        channels=channels,
        dx_row_stride=dx.stride(0),
        residual_row_stride=0 if residual is None else residual.stride(0),
        g_row_stride=g.stride(0),
        dx_dtype=dtype_name(dx),
        g_dtype=dtype_name(g),
    )
    return g, None if partials is None else partials.sum(0)
