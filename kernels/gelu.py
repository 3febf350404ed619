"""GELU and its gradient in tiles of rows and columns; the gradient can go in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels.launches import launchable

ROWS = 16
COLUMNS = 128  # divides every hidden width of DINOv2
# Programs of a backward with sums, over all blocks of columns. It never depends on the GPU, so
# that neither does the order of any sum; it fills the 132 multiprocessors of an H100.
NUM_PROGRAMS = 2048


@triton.jit
def _phi(x):
    """Normal distribution function."""
    return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def _forward_kernel(
    x_ptr,  # [R, F]
    a_ptr,  # [R, F]
    num_rows,  # R
    width,  # F
    stride_xr,
    stride_ar,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < num_rows)[:, None] & (f < width)[None, :]
    r = r.to(tl.int64)
    x_ptrs = x_ptr + r[:, None] * stride_xr + f[None, :]
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    a_ptrs = a_ptr + r[:, None] * stride_ar + f[None, :]
    tl.store(a_ptrs, (x * _phi(x)).to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    da_ptr,  # [R, F]
    x_ptr,  # [R, F]
    dx_ptr,  # [R, F], may be x
    a_ptr,  # [R, F], may be da; or None
    partials_ptr,  # [programs, F] float32, or None
    num_rows,  # R
    width,  # F
    stride_dar,
    stride_xr,
    stride_dxr,
    stride_ar,
    HAS_A: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_f = f < width
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(program * ROWS, num_rows, tl.num_programs(0) * ROWS):
        r = first + tl.arange(0, ROWS)
        inside = (r < num_rows)[:, None] & in_f[None, :]
        r = r.to(tl.int64)
        x_ptrs = x_ptr + r[:, None] * stride_xr + f[None, :]
        x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
        da_ptrs = da_ptr + r[:, None] * stride_dar + f[None, :]
        da = tl.load(da_ptrs, mask=inside, other=0.0).to(tl.float32)
        phi = _phi(x)
        # Past 16 the density is 0, and x * x may overflow.
        near = tl.minimum(tl.maximum(x, -16.0), 16.0)
        dx = da * (phi + near * (0.3989422804014327 * tl.exp(-0.5 * near * near)))
        if HAS_SUMS:
            sums += dx
        dx_ptrs = dx_ptr + r[:, None] * stride_dxr + f[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if HAS_A:
            a_ptrs = a_ptr + r[:, None] * stride_ar + f[None, :]
            tl.store(a_ptrs, (x * phi).to(a_ptr.dtype.element_ty), mask=inside)
    if HAS_SUMS:
        partial_ptrs = partials_ptr + program.to(tl.int64) * width + f
        tl.store(partial_ptrs, tl.sum(sums, axis=0), mask=in_f)


def forward(x: Tensor, a: Tensor) -> None:
    """Writes a = gelu(x), [R, F]."""
    if x.numel() == 0:
        return
    num_rows, width = x.shape
    grid = (triton.cdiv(num_rows, ROWS), triton.cdiv(width, COLUMNS))
    launchable(_forward_kernel, x)[grid](
        x,
        a,
        num_rows,
        width,
        x.stride(0),
        a.stride(0),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )


def backward(
    da: Tensor, x: Tensor, dx: Tensor, a: Tensor | None, *, want_sums: bool
) -> Tensor | None:
    """Writes dx (may be x) and, unless None, a = gelu(x) (may be da); column sums of dx."""
    num_rows, width = x.shape
    if x.numel() == 0:
        return x.new_zeros(width, dtype=torch.float32) if want_sums else None
    row_blocks, column_blocks = triton.cdiv(num_rows, ROWS), triton.cdiv(width, COLUMNS)
    partials = None
    if want_sums:
        row_blocks = min(row_blocks, triton.cdiv(NUM_PROGRAMS, column_blocks))
        partials = x.new_empty((row_blocks, width), dtype=torch.float32)
    launchable(_backward_kernel, x)[(row_blocks, column_blocks)](
        da,
        x,
        dx,
        a,
        partials,
        num_rows,
        width,
        da.stride(0),
        x.stride(0),
        dx.stride(0),
        0 if a is None else a.stride(0),
        HAS_A=a is not None,
        HAS_SUMS=want_sums,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    return None if partials is None else partials.sum(0)
