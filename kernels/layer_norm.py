"""Layer norm of gathered rows, and its gradient added to those rows in place.

A program takes whole rows, one a warp, so that the statistics of a row never leave its warp. Rows
are read once, in the forward and in the backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels.launches import launchable, programs_of

# Programs of the backward, and partial sums of weight and bias gradients. It never depends on the
# GPU, so that neither does the order of any sum; it fills the 132 multiprocessors of an H100.
NUM_PROGRAMS = 512


@triton.jit
def _forward_kernel(
    x_ptr,  # [T, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    rows_ptr,  # [R] int64, or None
    y_ptr,  # [R, C]
    mean_ptr,  # [R] float32, or None
    rstd_ptr,  # [R] float32
    num_rows,  # R
    channels,  # C
    channels_float,  # C
    stride_xt,
    stride_yr,
    eps,
    HAS_ROWS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    in_r = r < num_rows
    in_c = c < channels
    inside = in_r[:, None] & in_c[None, :]
    target = r.to(tl.int64)
    source = target
    if HAS_ROWS:
        source = tl.load(rows_ptr + r, mask=in_r, other=0).to(tl.int64)
    x = tl.load(x_ptr + source[:, None] * stride_xt + c[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    mean = tl.math.div_rn(tl.sum(x, axis=1), channels_float)
    centred = tl.where(in_c[None, :], x - mean[:, None], 0.0)
    variance = tl.math.div_rn(tl.sum(centred * centred, axis=1), channels_float)
    rstd = tl.math.div_rn(1.0, tl.math.sqrt_rn(variance + eps))
    weight = tl.load(weight_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    y_ptrs = y_ptr + target[:, None] * stride_yr + c[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)
    if HAS_MEAN:
        tl.store(mean_ptr + r, mean, mask=in_r)
    tl.store(rstd_ptr + r, rstd, mask=in_r)


@triton.jit
def _backward_kernel(
    dx_ptr,  # [T, C] added to with ADD, else [R, C]
    dy_ptr,  # [R, C]
    source_ptr,  # output or normalised rows [R, C], or input [T, C] with HAS_MEAN
    mean_ptr,  # [R] float32, or None
    rstd_ptr,  # [R] float32
    weight_ptr,  # [C]
    bias_ptr,  # [C], or None
    source_rows_ptr,  # [R] int64, or None
    dx_rows_ptr,  # [R] int64, or None
    partials_ptr,  # [programs, 2, C] float32: gradients of weight and bias
    num_rows,  # R
    channels,  # C
    channels_float,  # C
    stride_dxt,
    stride_dyr,
    stride_source,
    ADD: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SOURCE_ROWS: tl.constexpr,
    HAS_DX_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    c = tl.arange(0, COLUMNS)
    in_c = c < channels
    weight = tl.load(weight_ptr + c, mask=in_c, other=1.0).to(tl.float32)
    if FROM_OUTPUT:
        bias = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(program * ROWS, num_rows, tl.num_programs(0) * ROWS):
        r = first + tl.arange(0, ROWS)
        in_r = r < num_rows
        inside = in_r[:, None] & in_c[None, :]
        r = r.to(tl.int64)
        source_row = r
        if HAS_SOURCE_ROWS:
            source_row = tl.load(source_rows_ptr + r, mask=in_r, other=0).to(tl.int64)
        dx_row = r
        if HAS_DX_ROWS:
            dx_row = tl.load(dx_rows_ptr + r, mask=in_r, other=0).to(tl.int64)
        dy = tl.load(dy_ptr + r[:, None] * stride_dyr + c[None, :], mask=inside, other=0.0)
        dy = dy.to(tl.float32)
        source_ptrs = source_ptr + source_row[:, None] * stride_source + c[None, :]
        x_hat = tl.load(source_ptrs, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + r, mask=in_r, other=0.0)
        if FROM_OUTPUT:
            x_hat = (x_hat - bias[None, :]) / weight[None, :]
        if HAS_MEAN:
            mean = tl.load(mean_ptr + r, mask=in_r, other=0.0)
            x_hat = (x_hat - mean[:, None]) * rstd[:, None]
        x_hat = tl.where(inside, x_hat, 0.0)
        dweight += dy * x_hat
        dbias += dy
        g = tl.where(inside, dy * weight[None, :], 0.0)
        along = tl.sum(g * x_hat, axis=1) / channels_float
        mean_g = tl.sum(g, axis=1) / channels_float
        dx = rstd[:, None] * (g - mean_g[:, None] - x_hat * along[:, None])
        dx_ptrs = dx_ptr + dx_row[:, None] * stride_dxt + c[None, :]
        if ADD:
            dx += tl.load(dx_ptrs, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    partial_ptrs = partials_ptr + program.to(tl.int64) * 2 * channels + c
    tl.store(partial_ptrs, tl.sum(dweight, axis=0), mask=in_c)
    tl.store(partial_ptrs + channels, tl.sum(dbias, axis=0), mask=in_c)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    rows: Tensor | None,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
) -> None:
    """Writes y [R, C], rstd [R] and, unless None, mean [R] of the rows of x [T, C]."""
    num_rows, channels = y.shape[0], int(y.shape[1])
    if num_rows == 0:
        return
    tile, num_warps = _tile(channels)
    launchable(_forward_kernel, x)[(triton.cdiv(num_rows, tile["ROWS"]),)](
        x,
        weight,
        bias,
        rows,
        y,
        mean,
        rstd,
        num_rows,
        channels,
        float(channels),
        x.stride(0),
        y.stride(0),
        eps,
        HAS_ROWS=rows is not None,
        HAS_MEAN=mean is not None,
        **tile,
        num_warps=num_warps,
    )


def backward(
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
) -> Tensor:
    """Writes or adds to dx; returns the gradients of weight and bias as [2, C] float32.

    `source` is the output if there is a bias, the input if there is a mean, else normalised rows.
    """
    num_rows, channels = dy.shape[0], int(dy.shape[1])
    if num_rows == 0:
        return dy.new_zeros((2, channels), dtype=torch.float32)
    tile, num_warps = _tile(channels)
    num_programs = programs_of(triton.cdiv(num_rows, tile["ROWS"]), NUM_PROGRAMS)
    partials = dy.new_empty((num_programs, 2, channels), dtype=torch.float32)
    launchable(_backward_kernel, dx)[(num_programs,)](
        dx,
        dy,
        source,
        mean,
        rstd,
        weight,
        bias,
        source_rows,
        dx_rows,
        partials,
        num_rows,
        channels,
        float(channels),
        dx.stride(0),
        dy.stride(0),
        source.stride(0),
        ADD=add,
        FROM_OUTPUT=bias is not None,
        HAS_MEAN=mean is not None,
        HAS_SOURCE_ROWS=source_rows is not None,
        HAS_DX_ROWS=dx_rows is not None,
        **tile,
        num_warps=num_warps,
    )
    return partials.sum(0)


def _tile(channels: int) -> tuple[dict[str, int], int]:
    """Rows and columns of a program, and its warps: 32 numbers a thread up to 2048 channels."""
    columns = triton.next_power_of_2(channels)
    rows = 4 if columns <= 2048 else 1
    return {"ROWS": rows, "COLUMNS": columns}, 4 if columns <= 1024 else 8
