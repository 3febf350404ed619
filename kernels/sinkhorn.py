"""Sums of exponentials over the columns and over the rows of a matrix of scores.

Every lane keeps the largest score it saw and a sum relative to it; the lanes meet at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels.launches import launchable

ROWS, COLUMNS = 16, 128  # a step over columns
ROW_COLUMNS = 2048  # a step along a row


@triton.jit
def _add(largest, sums, scores):
    """One score more for every lane; a lane that saw nothing but -inf has the sum 0."""
    new = tl.maximum(largest, scores)
    common = tl.where(new == -float("inf"), 0.0, new)
    return new, sums * tl.exp(largest - common) + tl.exp(scores - common)


@triton.jit
def _columns_kernel(
    logits_ptr,  # [R, K]
    log_v_ptr,  # [R] float32
    largest_ptr,  # [K] float32
    sums_ptr,  # [K] float32
    num_rows,  # R
    num_columns,  # K
    stride_r,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_k = k < num_columns
    largest = tl.full([ROWS, COLUMNS], -float("inf"), dtype=tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, num_rows, ROWS):
        r = first + tl.arange(0, ROWS)
        in_r = r < num_rows
        inside = in_r[:, None] & in_k[None, :]
        log_v = tl.load(log_v_ptr + r, mask=in_r, other=0.0)
        logits_ptrs = logits_ptr + r.to(tl.int64)[:, None] * stride_r + k[None, :]
        logits = tl.load(logits_ptrs, mask=inside, other=0.0).to(tl.float32)
        scores = tl.where(inside, logits * scale + log_v[:, None], -float("inf"))
        largest, sums = _add(largest, sums, scores)
    column_largest = tl.max(largest, axis=0)
    common = tl.where(column_largest == -float("inf"), 0.0, column_largest)
    column_sums = tl.sum(sums * tl.exp(largest - common[None, :]), axis=0)
    tl.store(largest_ptr + k, column_largest, mask=in_k)
    tl.store(sums_ptr + k, column_sums, mask=in_k)


@triton.jit
def _rows_kernel(
    logits_ptr,  # [R, K]
    log_u_ptr,  # [K] float32
    lse_ptr,  # [R] float32
    num_columns,  # K
    stride_r,
    scale,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full([COLUMNS], -float("inf"), dtype=tl.float32)
    sums = tl.zeros([COLUMNS], dtype=tl.float32)
    for first in range(0, num_columns, COLUMNS):
        k = first + tl.arange(0, COLUMNS)
        inside = k < num_columns
        log_u = tl.load(log_u_ptr + k, mask=inside, other=0.0)
        logits = tl.load(logits_ptr + row * stride_r + k, mask=inside, other=0.0).to(tl.float32)
        scores = tl.where(inside, logits * scale + log_u, -float("inf"))
        largest, sums = _add(largest, sums, scores)
    row_largest = tl.max(largest, axis=0)
    common = tl.where(row_largest == -float("inf"), 0.0, row_largest)
    row_sum = tl.sum(sums * tl.exp(largest - common), axis=0)
    tl.store(lse_ptr + row, common + tl.log(row_sum))


def columns(logits: Tensor, log_v: Tensor, scale: float, largest: Tensor, sums: Tensor) -> None:
    """Writes the largest of logits * scale + log_v of each column, and sums relative to it, [K]."""
    num_rows, num_columns = logits.shape
    if num_columns == 0:
        return
    launchable(_columns_kernel, logits)[(triton.cdiv(num_columns, COLUMNS),)](
        logits,
        log_v,
        largest,
        sums,
        num_rows,
        num_columns,
        logits.stride(0),
        scale,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )


def rows(logits: Tensor, log_u: Tensor, scale: float, lse: Tensor) -> None:
    """Writes the logarithm of each row's sum of exp(logits * scale + log_u), [R]."""
    num_rows, num_columns = logits.shape
    if num_rows == 0:
        return
    launchable(_rows_kernel, logits)[(num_rows,)](
        logits,
        log_u,
        lse,
        num_columns,
        logits.stride(0),
        scale,
        COLUMNS=min(ROW_COLUMNS, triton.next_power_of_2(max(int(num_columns), 1))),
        num_warps=8,
    )
