"""The layer norm's native kernels, those of the CPU and those of CUDA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dinov2_fast.ops._native import run_native
from dinov2_fast.ops._native_cpu import (
    BLOCK_ROWS,
    Argument,
    dtype_name,
    in_float32,
    native_floats,
    on_cuda,
    why_not_pair,
)

MAX_CHANNELS = 8192  # on a GPU a row and the sums over rows must fit in shared memory
# CTAs of the backward, and partial sums of weight and bias gradients. It never depends on the GPU,
# so that neither does the order of any sum; it fills the 132 multiprocessors of an H100.
_MAX_PARTIALS = 528


def why_not_native_layer_norm(stream: Tensor, branch: torch.dtype, *others: Tensor) -> str:
    """Why the native kernels take no such stream [T, C] and type of its branch's tensors, or ""."""
    if branch not in native_floats(stream):
        return f"out_dtype must be one of {native_floats(stream)}, got {branch}"
    if not on_cuda(stream):
        return ""
    if stream.shape[-1] > MAX_CHANNELS:
        return f"it takes at most {MAX_CHANNELS} channels, got {stream.shape[-1]}"
    if any(other.dtype != branch for other in others):
        return f"all tensors of a branch must be {branch}"
    return why_not_pair(stream, branch)


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
    num_rows, channels = (x if rows is None else rows).shape[0], x.shape[1]
    y = x.new_empty((num_rows, channels), dtype=out_dtype)
    rstd = x.new_empty(num_rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if want_mean else None
    run_native(
        "layer_norm_forward",
        x=x,
        weight=in_float32(weight),  # [C]: nothing beside the rows
        bias=in_float32(bias),
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
    shift = None if normalised else bias
    return _backward(dx, dy, source, None, rstd, weight, shift, None, rows, add=True)


def backward_of_input_native(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the selected rows [R, C], of weight and of bias."""
    dx = dy.new_empty(dy.shape, dtype=x.dtype)
    return dx, *_backward(dx, dy, x, mean, rstd, weight, None, rows, None, add=False)


def _backward(
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
    wide = in_float32(weight)
    outputs: tuple[Tensor, Tensor] | None = None
    own: Mapping[str, Argument]
    if on_cuda(dx):
        num_partials = min(num_rows, _MAX_PARTIALS)
        scratch = wide.new_empty((num_partials, 2, channels))
        own = {"partials": scratch, "num_partials": num_partials}
    else:
        # What x_hat is made with, the sums, those over each block of rows, and a row of each block.
        scratch = wide.new_empty((2 + 2 * -(-num_rows // BLOCK_ROWS), 2, channels))
        outputs = torch.empty_like(wide), torch.empty_like(wide)
        own = {
            "scratch": scratch,
            "dweight": outputs[0],
            "dbias": outputs[1],
            "num_source_rows": source.shape[0],
            "num_dx_rows": dx.shape[0],
            "block_rows": BLOCK_ROWS,
            "source_dtype": dtype_name(source),
            "op": "layer_norm_backward_" if add else "layer_norm_backward",
        }
    run_native(
        "layer_norm_backward",
        dy=dy,
        source=source,
        mean=mean,
        rstd=rstd,
        weight=wide,
        bias=None if bias is None else in_float32(bias),
        source_rows=source_rows,
        dx_rows=dx_rows,
        dx=dx,
        num_rows=num_rows,
        channels=channels,
        dy_row_stride=dy.stride(0),
        source_row_stride=source.stride(0),
        dx_row_stride=dx.stride(0),
        add=add,
        dy_dtype=dtype_name(dy),
        dx_dtype=dtype_name(dx),
        **own,
    )
    dweight, dbias = scratch.sum(0) if outputs is None else outputs
    if outputs is not None and weight is wide:
        return outputs
    copy = outputs is None  # outputs of an op must not share storage
    return dweight.to(weight.dtype, copy=copy), dbias.to(weight.dtype, copy=copy)
