"""KoLeo's nearest rows, distances and their gradient; products of rows are float32.

The search cuts the keys into parts that programs share; no order of a sum depends on the GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dinov2_fast.kernels.launches import launchable

QUERIES, KEYS, DEPTH = 32, 32, 32  # a tile of products, and the channels of a step
COLUMNS = 1024  # a step along a row
SCAN = 128  # rows that are looked through at once for those that pull at one
GATHERED = 8192  # numbers of the rows that are gathered at once, 32 a thread; one row at least
NUM_SPLITS = 16  # parts of the keys


@triton.jit
def _normalise_kernel(
    x_ptr,  # [B, C]
    normalised_ptr,  # [B, C]
    norms_ptr,  # [B]
    channels,  # C
    stride_xb,
    eps,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([COLUMNS], dtype=tl.float64)
    for first in range(0, channels, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + row * stride_xb + c, mask=c < channels, other=0.0).to(tl.float64)
        squares += x * x
    length = tl.sqrt(tl.sum(squares, axis=0)).to(tl.float32)
    norm = tl.where(length < eps, eps, length)  # keeps NaN
    for first in range(0, channels, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + row * stride_xb + c, mask=c < channels, other=0.0)
        unit = tl.div_rn(x, tl.zeros_like(x) + norm)
        tl.store(normalised_ptr + row * channels + c, unit, mask=c < channels)
    tl.store(norms_ptr + row, norm)


@triton.jit
def _nearest_kernel(
    normalised_ptr,  # [B, C]
    products_ptr,  # [B, splits], adjacent; the largest with a key of the part; -inf without any
    keys_ptr,  # [B, splits] int64, the lowest key that has it
    num_rows,  # B
    channels,  # C
    keys_of_split,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    split = tl.program_id(1)
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    query_ptrs = normalised_ptr + query.to(tl.int64)[:, None] * channels
    best = tl.full([QUERIES], -float("inf"), dtype=tl.float32)
    best_key = tl.zeros([QUERIES], dtype=tl.int64)
    end = tl.minimum((split + 1) * keys_of_split, num_rows)
    for first in range(split * keys_of_split, end, KEYS):
        key = first + tl.arange(0, KEYS)
        key_ptrs = normalised_ptr + key.to(tl.int64)[:, None] * channels
        products = tl.zeros([QUERIES, KEYS], dtype=tl.float32)
        for depth in range(0, channels, DEPTH):
            c = depth + tl.arange(0, DEPTH)
            in_c = (c < channels)[None, :]
            queries = tl.load(query_ptrs + c, mask=(query < num_rows)[:, None] & in_c, other=0.0)
            keys = tl.load(key_ptrs + c, mask=(key < num_rows)[:, None] & in_c, other=0.0)
            products = tl.dot(queries, tl.trans(keys), products, input_precision="ieee")
        other = (key < end)[None, :] & (key[None, :] != query[:, None])
        seen = other & (products == products)  # NaN is nobody's nearest
        products = tl.where(seen, products, -float("inf"))
        largest, place = tl.max(products, axis=1, return_indices=True)  # the first of a tie
        nearer = largest > best
        best = tl.where(nearer, largest, best)
        best_key = tl.where(nearer, first + place, best_key)
    ptrs = query.to(tl.int64) * tl.num_programs(1) + split
    tl.store(products_ptr + ptrs, best, mask=query < num_rows)
    tl.store(keys_ptr + ptrs, best_key, mask=query < num_rows)


@triton.jit
def _distance_kernel(
    normalised_ptr,  # [B, C]
    products_ptr,  # [B, splits]
    keys_ptr,  # [B, splits] int64
    nearest_ptr,  # [B] int64
    losses_ptr,  # [B]
    pulls_ptr,  # [B]
    channels,  # C
    num_splits,
    eps,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    of_splits = row * num_splits + split
    exists = split < num_splits
    products = tl.load(products_ptr + of_splits, mask=exists, other=-float("inf"))
    keys = tl.load(keys_ptr + of_splits, mask=exists, other=0)
    largest, place = tl.max(products, axis=0, return_indices=True)  # lower keys come first
    nearest = tl.sum(tl.where(split == place, keys, 0), axis=0)
    none = tl.where(row == 0, 1, 0).to(tl.int64)  # where every product is NaN
    nearest = tl.where(largest == -float("inf"), none, nearest)
    squares = tl.zeros([COLUMNS], dtype=tl.float64)
    differs = tl.zeros([COLUMNS], dtype=tl.int32)
    for first in range(0, channels, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        inside = c < channels
        own = tl.load(normalised_ptr + row * channels + c, mask=inside, other=0.0)
        other = tl.load(normalised_ptr + nearest * channels + c, mask=inside, other=0.0)
        apart = tl.where(inside, own - other + eps, 0.0).to(tl.float64)
        squares += apart * apart
        differs |= (own != other).to(tl.int32)
    distance = tl.sqrt(tl.sum(squares, axis=0))
    pull = tl.where(tl.max(differs, axis=0) > 0, 1.0 / ((distance + eps) * distance), 0.0)
    tl.store(nearest_ptr + row, nearest)
    tl.store(losses_ptr + row, (-tl.log(distance + eps)).to(tl.float32))
    tl.store(pulls_ptr + row, pull.to(tl.float32))


@triton.jit
def _backward_kernel(
    gradients_ptr,  # [B], of the losses
    normalised_ptr,  # [B, C]
    norms_ptr,  # [B]
    nearest_ptr,  # [B] int64
    pulls_ptr,  # [B]
    dx_ptr,  # [B, C]
    num_rows,  # B
    channels,  # C
    eps,
    SCAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # all channels
):
    """Gradient of one row: its own pull, and those of the rows whose nearest it is."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, COLUMNS)
    inside = c < channels
    unit = tl.load(normalised_ptr + row * channels + c, mask=inside, other=0.0)
    nearest = tl.load(nearest_ptr + row)
    other = tl.load(normalised_ptr + nearest * channels + c, mask=inside, other=0.0)
    factor = tl.load(gradients_ptr + row) * tl.load(pulls_ptr + row)
    # Between equal rows, whose pull is 0, eps alone has a direction.
    dx = tl.where(factor == 0.0, 0.0, -factor * (unit - other + eps))
    for first in range(0, num_rows, SCAN):
        i = first + tl.arange(0, SCAN)
        found = tl.load(nearest_ptr + i, mask=i < num_rows, other=-1) == row
        if tl.max(found.to(tl.int32), axis=0) > 0:
            for start in range(first, first + SCAN, ROWS):
                r = start + tl.arange(0, ROWS)
                in_r = r < num_rows
                follows = tl.load(nearest_ptr + r, mask=in_r, other=-1) == row
                factors = tl.load(gradients_ptr + r, mask=follows, other=0.0)
                factors *= tl.load(pulls_ptr + r, mask=follows, other=0.0)
                pulls = follows & (factors != 0.0)
                ptrs = normalised_ptr + r.to(tl.int64)[:, None] * channels + c[None, :]
                followers = tl.load(ptrs, mask=pulls[:, None] & inside[None, :], other=0.0)
                apart = factors[:, None] * (followers - unit[None, :] + eps)
                dx += tl.sum(tl.where(pulls[:, None], apart, 0.0), axis=0)
    norm = tl.load(norms_ptr + row)
    along = tl.sum(tl.where(inside, dx * unit, 0.0), axis=0)
    radial = tl.where(norm > eps, along, 0.0)  # a shorter row was divided by a constant
    dx = (dx - radial * unit) / norm
    tl.store(dx_ptr + row * channels + c, dx, mask=inside)


def forward(
    x: Tensor,
    losses: Tensor,
    normalised: Tensor,
    norms: Tensor,
    nearest: Tensor,
    pulls: Tensor,
    eps: float,
) -> None:
    """Writes losses [B], unit rows [B, C], lengths [B], nearest rows [B] and pulls [B]."""
    num_rows, channels = x.shape[0], int(x.shape[1])
    columns = min(COLUMNS, triton.next_power_of_2(channels))
    launchable(_normalise_kernel, x)[(num_rows,)](
        x, normalised, norms, channels, x.stride(0), eps, COLUMNS=columns, num_warps=4
    )
    keys_of_split = KEYS * triton.cdiv(num_rows, KEYS * NUM_SPLITS)
    num_splits = triton.cdiv(num_rows, keys_of_split)
    # Room for the most parts: a graph of sizes that change would ask whether there is but one.
    products = x.new_empty(num_rows, NUM_SPLITS)
    keys = nearest.new_empty(num_rows, NUM_SPLITS)
    launchable(_nearest_kernel, x)[(triton.cdiv(num_rows, QUERIES), num_splits)](
        normalised,
        products,
        keys,
        num_rows,
        channels,
        keys_of_split,
        QUERIES=QUERIES,
        KEYS=KEYS,
        DEPTH=DEPTH,
        num_warps=4,
    )
    launchable(_distance_kernel, x)[(num_rows,)](
        normalised,
        products,
        keys,
        nearest,
        losses,
        pulls,
        channels,
        num_splits,
        eps,
        SPLITS=NUM_SPLITS,
        COLUMNS=columns,
        num_warps=4,
    )


def backward(
    gradients: Tensor,
    normalised: Tensor,
    norms: Tensor,
    nearest: Tensor,
    pulls: Tensor,
    dx: Tensor,
    eps: float,
) -> None:
    """Writes dx [B, C], of at most GATHERED channels."""
    num_rows, channels = dx.shape[0], int(dx.shape[1])
    columns = triton.next_power_of_2(channels)
    launchable(_backward_kernel, dx)[(num_rows,)](
        gradients,
        normalised,
        norms,
        nearest,
        pulls,
        dx,
        num_rows,
        channels,
        eps,
        SCAN=SCAN,
        ROWS=min(GATHERED // columns, 16),
        COLUMNS=columns,
        num_warps=8,
    )
