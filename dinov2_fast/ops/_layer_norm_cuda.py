"""The layer norm's CUDA kernels, called as `_layer_norm_native` calls those of the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast.ops._native_cpu import dtype_name
from dinov2_fast.ops._native_cuda import run_cuda

MAX_CHANNELS = 8192  # a row and the sums over rows must fit in shared memory
# CTAs of the backward, and partial sums of weight and bias gradients. It never depends on the GPU,
# so that neither does the order of any sum; it fills the 132 multiprocessors of an H100.
_MAX_PARTIALS = 528


def forward_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    rows: Tensor | None,
    out_dtype: torch.dtype,
    *,
    want_mean: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Forward: y [R, C] in out_dtype, rstd [R], and the mean [R] if wanted."""
    num_rows, channels = (x if rows is None else rows).shape[0], x.shape[1]
    y = x.new_empty((num_rows, channels), dtype=out_dtype)
    rstd = x.new_empty(num_rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if want_mean else None
    run_cuda(
        "layer_norm_forward_cuda",
        x=x,
        weight=weight.float(),  # [C]: nothing beside the rows
        bias=bias.float(),
        rows=rows,
        y=y,
        mean=mean,
        rstd=rstd,
        num_rows=num_rows,
        channels=channels,
        x_row_stride=x.stride(0),
        y_row_stride=y.stride(0),
        eps=eps,
        x_dtype=dtype_name(x),
        y_dtype=dtype_name(y),
    )
    return y, rstd, mean


def backward_cuda(
    dx: Tensor,
    dy: Tensor,
    source: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source_rows: Tensor | None,
    dx_rows: Tensor | None,
    *,
    add: bool,
) -> tuple[Tensor, Tensor]:
    """Writes or adds to dx; returns the gradients of weight and bias.

    `source` is the output if there is a bias, the input if there is a mean, else normalised rows.
    """
    num_rows, channels = dy.shape
    num_partials = min(num_rows, _MAX_PARTIALS)
    partials = weight.new_empty((num_partials, 2, channels), dtype=torch.float32)
    run_cuda(
        "layer_norm_backward_cuda",
        dy=dy,
        source=source,
        mean=mean,
        rstd=rstd,
        weight=weight.float(),
        bias=None if bias is None else bias.float(),
        source_rows=source_rows,
        dx_rows=dx_rows,
        dx=dx,
        partials=partials,
        num_partials=num_partials,
        num_rows=num_rows,
        channels=channels,
        dy_row_stride=dy.stride(0),
        source_row_stride=source.stride(0),
        dx_row_stride=dx.stride(0),
        add=add,
        dx_dtype=dtype_name(dx),
        dy_dtype=dtype_name(dy),
    )
    dweight, dbias = partials.sum(0)
    # Storage of their own: outputs of an op must not share any.
    return dweight.to(weight.dtype, copy=True), dbias.to(weight.dtype, copy=True)
