"""The kernels of stochastic depth on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast.ops._native_rows import BLOCK_ROWS, dtype_name, new_partials, run_cpu


def scatter_cpu_(
    x: Tensor,
    residual: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    gamma: Tensor | None,
) -> None:
    """x[rows] += residual * row_scale * gamma."""
    if x.shape[1] == 0:
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
    )


def gather_cpu(
    dx: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    gamma: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    *,
    want_sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """Scaled rows g = dx[rows] * row_scale * gamma, and the sums [C] of dx[rows] * row_scale * residual.

    Args:
        dx: [T, C].
        rows: [R], or all.
        row_scale: [R], or ones.
        gamma: [C], or ones.
        residual: [R, C] in out_dtype, or ones.
        out_dtype: of g.
        want_sums: whether to compute the sums.
    Returns:
        g [R, C], and the sums in float32 if wanted.
    """
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
    )
    return g, sums


def _ones_or(gamma: Tensor | None, like: Tensor) -> Tensor:
    """Gamma in float32: C numbers, nothing beside the rows."""
    return like.new_ones(like.shape[1], dtype=torch.float32) if gamma is None else gamma.float()
