"""SwiGLU and its gradient in tiles of rows and columns; the gradient can go in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels.launches import launchable

ROWS = 16
COLUMNS = 128  # divides the hidden width of ViT-g/14, 4096
# Programs of a backward with sums, over all blocks of columns. It never depends on the GPU, so
# that neither does the order of any sum; it fills the 132 multiprocessors of an H100.
NUM_PROGRAMS = 2048


@triton.jit
def _forward_kernel(
    x12_ptr,  # [R, 2F]
    h_ptr,  # [R, F]
    num_rows,  # R
    hidden,  # F
    stride_x12r,
    stride_hr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < num_rows)[:, None] & (f < hidden)[None, :]
    r = r.to(tl.int64)
    x1_ptrs = x12_ptr + r[:, None] * stride_x12r + f[None, :]
    x1 = tl.load(x1_ptrs, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x1_ptrs + hidden, mask=inside, other=0.0).to(tl.float32)
    h = x1 / (1.0 + tl.exp(-x1)) * x2
    h_ptrs = h_ptr + r[:, None] * stride_hr + f[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dh_ptr,  # [R, F]
    x12_ptr,  # [R, 2F]
    dx12_ptr,  # [R, 2F], may be x12
    h_ptr,  # [R, F], may be dh; or None
    partials_ptr,  # [programs, 2F] float32, or None
    num_rows,  # R
    hidden,  # F
    stride_dhr,
    stride_x12r,
    stride_dx12r,
    stride_hr,
    HAS_H: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_f = f < hidden
    sums1 = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    sums2 = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(program * ROWS, num_rows, tl.num_programs(0) * ROWS):
        r = first + tl.arange(0, ROWS)
        inside = (r < num_rows)[:, None] & in_f[None, :]
        r = r.to(tl.int64)
        x1_ptrs = x12_ptr + r[:, None] * stride_x12r + f[None, :]
        x1 = tl.load(x1_ptrs, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(x1_ptrs + hidden, mask=inside, other=0.0).to(tl.float32)
        dh_ptrs = dh_ptr + r[:, None] * stride_dhr + f[None, :]
        dh = tl.load(dh_ptrs, mask=inside, other=0.0).to(tl.float32)
        denominator = 1.0 + tl.exp(-x1)
        s = 1.0 / denominator
        silu = x1 / denominator
        dx1 = dh * x2 * (s * (1.0 + x1 * (1.0 - s)))
        dx2 = dh * silu
        if HAS_SUMS:
            sums1 += dx1
            sums2 += dx2
        dx1_ptrs = dx12_ptr + r[:, None] * stride_dx12r + f[None, :]
        tl.store(dx1_ptrs, dx1.to(dx12_ptr.dtype.element_ty), mask=inside)
        tl.store(dx1_ptrs + hidden, dx2.to(dx12_ptr.dtype.element_ty), mask=inside)
        if HAS_H:
            h_ptrs = h_ptr + r[:, None] * stride_hr + f[None, :]
            tl.store(h_ptrs, (silu * x2).to(h_ptr.dtype.element_ty), mask=inside)
    if HAS_SUMS:
        partial_ptrs = partials_ptr + program.to(tl.int64) * 2 * hidden + f
        tl.store(partial_ptrs, tl.sum(sums1, axis=0), mask=in_f)
        tl.store(partial_ptrs + hidden, tl.sum(sums2, axis=0), mask=in_f)


def forward(x12: Tensor, h: Tensor) -> None:
    """Writes h = silu(x1) * x2, [R, F]."""
    if h.numel() == 0:
        return
    num_rows, hidden = h.shape
    grid = (triton.cdiv(num_rows, ROWS), triton.cdiv(hidden, COLUMNS))
    launchable(_forward_kernel, x12)[grid](
        x12,
        h,
        num_rows,
        hidden,
        x12.stride(0),
        h.stride(0),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )


def backward(
    dh: Tensor, x12: Tensor, dx12: Tensor, h: Tensor | None, *, want_sums: bool
) -> Tensor | None:
    """Writes dx12 (may be x12) and, unless None, h (may be dh); column sums of dx12."""
    num_rows, hidden = dh.shape
    if dh.numel() == 0:
        return x12.new_zeros(2 * hidden, dtype=torch.float32) if want_sums else None
    row_blocks, column_blocks = triton.cdiv(num_rows, ROWS), triton.cdiv(hidden, COLUMNS)
    partials = None
    if want_sums:
        row_blocks = min(row_blocks, triton.cdiv(NUM_PROGRAMS, column_blocks))
        partials = x12.new_empty((row_blocks, 2 * hidden), dtype=torch.float32)
    launchable(_backward_kernel, x12)[(row_blocks, column_blocks)](
        dh,
        x12,
        dx12,
        h,
        partials,
        num_rows,
        hidden,
        dh.stride(0),
        x12.stride(0),
        dx12.stride(0),
        0 if h is None else h.stride(0),
        HAS_H=h is not None,
        HAS_SUMS=want_sums,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    return None if partials is None else partials.sum(0)
