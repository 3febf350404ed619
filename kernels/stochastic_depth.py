"""Rows gathered from the residual stream, and branch outputs added into it, in tiles of both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels.launches import launchable, programs_of

ROWS = 16
COLUMNS = 128  # divides every width of DINOv2
# Programs of a gather with sums, over all blocks of columns. It never depends on the GPU, so that
# neither does the order of any sum; it fills the 132 multiprocessors of an H100.
NUM_PROGRAMS = 2048


@triton.jit
def _scatter_kernel(
    x_ptr,  # [T, C], added to
    residual_ptr,  # [R, C]
    rows_ptr,  # [R] int64, or None
    row_scale_ptr,  # [R] float32, or None
    gamma_ptr,  # [C], or None
    num_rows,  # R
    channels,  # C
    stride_xt,
    stride_rr,
    HAS_ROWS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_r = r < num_rows
    in_c = c < channels
    inside = in_r[:, None] & in_c[None, :]
    source = r.to(tl.int64)
    target = source
    if HAS_ROWS:
        target = tl.load(rows_ptr + r, mask=in_r, other=0).to(tl.int64)
    residual_ptrs = residual_ptr + source[:, None] * stride_rr + c[None, :]
    update = tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        update *= tl.load(row_scale_ptr + r, mask=in_r, other=0.0)[:, None]
    if HAS_GAMMA:
        update *= tl.load(gamma_ptr + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    x_ptrs = x_ptr + target[:, None] * stride_xt + c[None, :]
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32) + update
    tl.store(x_ptrs, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gather_kernel(
    dx_ptr,  # [T, C]
    rows_ptr,  # [R] int64, or None
    row_scale_ptr,  # [R] float32, or None
    gamma_ptr,  # [C], or None
    residual_ptr,  # [R, C], or None
    g_ptr,  # [R, C]
    partials_ptr,  # [programs, C] float32: sums of dx * row_scale * residual; or None
    num_rows,  # R
    channels,  # C
    stride_dxt,
    stride_rr,
    stride_gr,
    HAS_ROWS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_c = c < channels
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if HAS_GAMMA:
        gamma = tl.load(gamma_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    for first in range(program * ROWS, num_rows, tl.num_programs(0) * ROWS):
        r = first + tl.arange(0, ROWS)
        in_r = r < num_rows
        inside = in_r[:, None] & in_c[None, :]
        target = r.to(tl.int64)
        source = target
        if HAS_ROWS:
            source = tl.load(rows_ptr + r, mask=in_r, other=0).to(tl.int64)
        dx_ptrs = dx_ptr + source[:, None] * stride_dxt + c[None, :]
        g = tl.load(dx_ptrs, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCALE:
            g *= tl.load(row_scale_ptr + r, mask=in_r, other=0.0)[:, None]
        if HAS_SUMS:
            part = g
            if HAS_RESIDUAL:
                residual_ptrs = residual_ptr + target[:, None] * stride_rr + c[None, :]
                part = g * tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
            sums += part
        if HAS_GAMMA:
            g *= gamma[None, :]
        g_ptrs = g_ptr + target[:, None] * stride_gr + c[None, :]
        tl.store(g_ptrs, g.to(g_ptr.dtype.element_ty), mask=inside)
    if HAS_SUMS:
        partial_ptrs = partials_ptr + program.to(tl.int64) * channels + c
        tl.store(partial_ptrs, tl.sum(sums, axis=0), mask=in_c)


def scatter_(
    x: Tensor,
    residual: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    gamma: Tensor | None,
) -> None:
    """x[rows] += residual * row_scale * gamma."""
    num_rows, channels = residual.shape
    if residual.numel() == 0:
        return
    grid = (triton.cdiv(num_rows, ROWS), triton.cdiv(channels, COLUMNS))
    launchable(_scatter_kernel, x)[grid](
        x,
        residual,
        rows,
        row_scale,
        gamma,
        num_rows,
        channels,
        x.stride(0),
        residual.stride(0),
        HAS_ROWS=rows is not None,
        HAS_SCALE=row_scale is not None,
        HAS_GAMMA=gamma is not None,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )


def gather(
    dx: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    gamma: Tensor | None,
    residual: Tensor | None,
    g: Tensor,
    *,
    want_sums: bool,
) -> Tensor | None:
    """Writes g = dx[rows] * row_scale * gamma; sums [C] of dx[rows] * row_scale * residual."""
    num_rows, channels = g.shape
    if g.numel() == 0:
        return dx.new_zeros(channels, dtype=torch.float32) if want_sums else None
    row_blocks, column_blocks = triton.cdiv(num_rows, ROWS), triton.cdiv(channels, COLUMNS)
    partials = None
    if want_sums:
        row_blocks = programs_of(row_blocks, triton.cdiv(NUM_PROGRAMS, column_blocks))
        partials = dx.new_empty((row_blocks, channels), dtype=torch.float32)
    launchable(_gather_kernel, dx)[(row_blocks, column_blocks)](
        dx,
        rows,
        row_scale,
        gamma,
        residual,
        g,
        partials,
        num_rows,
        channels,
        dx.stride(0),
        0 if residual is None else residual.stride(0),
        g.stride(0),
        HAS_ROWS=rows is not None,
        HAS_SCALE=row_scale is not None,
        HAS_GAMMA=gamma is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_SUMS=want_sums,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    return None if partials is None else partials.sum(0)
