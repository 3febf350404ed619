"""The layer norm's native kernels: those of the CPU, or those of `_layer_norm_cuda`."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast.ops._layer_norm_cuda import MAX_CHANNELS, backward_cuda, forward_cuda
from dinov2_fast.ops._native_cpu import (
    BLOCK_ROWS,
    dtype_name,
    new_partials,
    on_cuda,
    refuse_pair,
    run_cpu,
)


def native_layer_norm_refusals(
    stream: Tensor, branch: torch.dtype, *others: Tensor
) -> dict[str, str]:
    """Why the native kernels take no such stream [T, C] and type of its branch's tensors."""
    if on_cuda(stream) and stream.shape[-1] > MAX_CHANNELS:
        why = f"it takes at most {MAX_CHANNELS} channels, got {stream.shape[-1]}"
        return {"native": why}
    if on_cuda(stream) and any(other.dtype != branch for other in others):
        return {"native": f"all tensors of a branch must be {branch}"}
    return refuse_pair(stream, branch)


def forward_native(
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
    if on_cuda(x):
        return forward_cuda(x, weight, bias, eps, rows, out_dtype, want_mean=want_mean)
    num_rows, channels = (x if rows is None else rows).shape[0], x.shape[1]
    y = x.new_empty((num_rows, channels), dtype=out_dtype)
    rstd = x.new_empty(num_rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if want_mean else None
    run_cpu(
        "layer_norm_forward_cpu",
        x=x,
        weight=weight.float(),  # [C]: nothing beside the rows
        bias=bias.float(),
        rows=rows,
        y=y,
        mean=mean,
        rstd=rstd,
        num_x_rows=x.shape[0],
        num_rows=num_rows,
        channels=channels,
        x_row_stride=x.stride(0),
        y_row_stride=y.stride(0),
        eps=eps,
        x_dtype=dtype_name(x),
        y_dtype=dtype_name(y),
        op="layer_norm",
    )
    return y, rstd, mean


def backward_of_output_native(
    dx: Tensor,
    dy: Tensor,
    source: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Tensor | None,
    *,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    """Adds to dx; `source` is the output, or the normalised input."""
    if on_cuda(dx):
        shift = None if normalised else bias
        return backward_cuda(dx, dy, source, None, rstd, weight, shift, None, rows, add=True)
    wide = weight.float()
    shift, inverse = bias.float(), 1 / wide
    if normalised:
        shift, inverse = torch.zeros_like(wide), torch.ones_like(wide)
    return _backward_cpu(dx, dy, source, shift, inverse, None, rstd, weight, None, rows, add=True)


def backward_of_input_native(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the selected rows [R, C], of weight and of bias."""
    dx = dy.new_empty(dy.shape, dtype=x.dtype)
    if on_cuda(x):
        sums = backward_cuda(dx, dy, x, mean, rstd, weight, None, rows, None, add=False)
        return dx, *sums
    wide = weight.float()
    shift, inverse = torch.zeros_like(wide), torch.ones_like(wide)
    dweight, dbias = _backward_cpu(
        dx, dy, x, shift, inverse, mean, rstd, weight, rows, None, add=False
    )
    return dx, dweight, dbias


def _backward_cpu(
    dx: Tensor,
    dy: Tensor,
    source: Tensor,
    shift: Tensor,
    inverse: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor,
    source_rows: Tensor | None,
    dx_rows: Tensor | None,
    *,
    add: bool,
) -> tuple[Tensor, Tensor]:
    """x_hat is (source - mean - shift) * rstd * inverse; without a mean, without rstd."""
    num_rows, channels = dy.shape
    sums = weight.new_empty((2, channels), dtype=torch.float32)
    wide = weight.float()
    run_cpu(
        "layer_norm_backward_cpu",
        dy=dy,
        source=source,
        shift=shift,
        inverse=inverse,
        mean=mean,
        rstd=rstd,
        weight=wide,
        source_rows=source_rows,
        dx_rows=dx_rows,
        dx=dx,
        partials=new_partials(weight, num_rows, 2, channels),
        sums=sums,
        num_source_rows=source.shape[0],
        num_dx_rows=dx.shape[0],
        num_rows=num_rows,
        channels=channels,
        block_rows=BLOCK_ROWS,
        dy_row_stride=dy.stride(0),
        source_row_stride=source.stride(0),
        dx_row_stride=dx.stride(0),
        add=add,
        dy_dtype=dtype_name(dy),
        source_dtype=dtype_name(source),
        dx_dtype=dtype_name(dx),
        op="layer_norm_backward_" if add else "layer_norm_backward",
    )
    # Storage of their own: outputs of an op must not share any.
    return sums[0].to(weight.dtype, copy=True), sums[1].to(weight.dtype, copy=True)
