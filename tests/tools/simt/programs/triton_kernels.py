"""Triton kernels whose compiled PTX the interpreter must execute like NumPy computes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matmul_kernel(
    a_ptr,  # [M, K]
    b_ptr,  # [K, N]
    c_ptr,  # [M, N] float32
    m,
    n,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, k, BLOCK_K):
        depth = begin + inner
        a = tl.load(
            a_ptr + rows[:, None] * k + depth[None, :],
            mask=(rows[:, None] < m) & (depth[None, :] < k),
            other=0.0,
        )
        b = tl.load(
            b_ptr + depth[:, None] * n + columns[None, :],
            mask=(depth[:, None] < k) & (columns[None, :] < n),
            other=0.0,
        )
        total = tl.dot(a, b, total)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(c_ptr + rows[:, None] * n + columns[None, :], total, mask=inside)


@triton.jit
def attention_kernel(
    q_ptr,  # [H, N, D]
    k_ptr,  # [H, N, D]
    v_ptr,  # [H, N, D]
    o_ptr,  # [H, N, D]
    n,
    scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK
    base = tl.program_id(1) * n * D
    rows, dims = start + tl.arange(0, BLOCK), tl.arange(0, D)
    place = base + rows[:, None] * D + dims[None, :]
    q = tl.load(q_ptr + place, mask=rows[:, None] < n, other=0.0)
    largest = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    out = tl.zeros((BLOCK, D), tl.float32)
    end = n
    if CAUSAL:
        end = tl.minimum(n, start + BLOCK)
    for begin in range(0, end, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        there = base + columns[:, None] * D + dims[None, :]
        k = tl.load(k_ptr + there, mask=columns[:, None] < n, other=0.0)
        v = tl.load(v_ptr + there, mask=columns[:, None] < n, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        seen = columns[None, :] < n
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None])
        scores = tl.where(seen, scores, -1e30)
        new = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - new[:, None])
        shrink = tl.exp(largest - new)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None]
        out = tl.dot(weights.to(v.dtype), v, out)
        largest = new
    out = out / total[:, None]
    tl.store(o_ptr + place, out.to(o_ptr.dtype.element_ty), mask=rows[:, None] < n)


@triton.jit
def layer_norm_kernel(
    x_ptr,  # [R, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    out_ptr,  # [R, C]
    c,
    epsilon,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < c
    x = tl.load(x_ptr + row * c + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / c
    centred = tl.where(inside, x - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / c + epsilon)
    weight = tl.load(weight_ptr + columns, mask=inside)
    bias = tl.load(bias_ptr + columns, mask=inside)
    tl.store(out_ptr + row * c + columns, centred * scale * weight + bias, mask=inside)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, c, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * c + columns, mask=columns < c, other=-float("inf"))
    shifted = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * c + columns, shifted / tl.sum(shifted, 0), mask=columns < c)


@triton.jit
def scan_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.cumsum(tl.load(x_ptr + at), 0))


@triton.jit
def sort_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.sort(tl.load(x_ptr + at)))


@triton.jit
def argmax_kernel(x_ptr, out_ptr, c, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * c + columns, mask=columns < c, other=-float("inf"))
    tl.store(out_ptr + row, tl.argmax(x, 0))


@triton.jit
def atomics_kernel(index_ptr, x_ptr, count_ptr, sum_ptr, largest_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + at, mask=at < n, other=0)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.atomic_add(count_ptr + index, 1, mask=at < n)
    tl.atomic_add(sum_ptr + index, x, mask=at < n)
    tl.atomic_max(largest_ptr + index, at, mask=at < n)


@triton.jit
def philox_kernel(out_ptr, seed, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.randint(seed, at))


@triton.jit
def tma_matmul_kernel(
    a,  # descriptor of [M, K], boxes of [BLOCK_M, BLOCK_K]
    b,  # descriptor of [K, N], boxes of [BLOCK_K, BLOCK_N]
    c,  # descriptor of [M, N], boxes of [BLOCK_M, BLOCK_N]
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, k, BLOCK_K):
        total = tl.dot(a.load([row, begin]), b.load([begin, column]), total)
    c.store([row, column], total.to(tl.bfloat16))
