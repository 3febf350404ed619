"""The Triton kernels of stochastic depth, called as `_stochastic_depth_native` calls the CPU's."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast.ops._triton import device_of


def scatter_triton_(
    x: Tensor,
    residual: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    gamma: Tensor | None,
    *,
    op: str,
) -> None:
    """x[rows] += residual * row_scale * gamma; nothing looks at the numbers of `rows`."""
    from dinov2_fast.kernels import stochastic_depth as kernels

    with device_of(x):
        kernels.scatter_(x, residual, rows, row_scale, gamma)


def gather_triton(
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

    Arguments and results are those of `gather_native`.
    """
    from dinov2_fast.kernels import stochastic_depth as kernels

    num_rows = (dx if rows is None else rows).shape[0]
    g = dx.new_empty((num_rows, dx.shape[1]), dtype=out_dtype)
    with device_of(dx):
        sums = kernels.gather(dx, rows, row_scale, gamma, residual, g, want_sums=want_sums)
    return g, sums
