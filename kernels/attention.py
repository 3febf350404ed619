"""Attention inside each sequence of a pack: forward, and backward without atomics.

One program computes a block of rows of one (sequence, head). Queries and keys of a program are
masked to its own sequence, so that neighbours in the pack are never read. Softmax runs in base 2 on
scores accumulated in float32; sums keep their order, so results are the same in every run.

Source: Dao, "FlashAttention-2", 2023; the backward pass is split by keys and by queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32

# Numbers that vary from pack to pack: no variant of a kernel is compiled for their divisibility.
_VARYING = ["sequence_0", "num_blocks", "num_heads", "stride_lh", "stride_eh"]


@triton.jit
def _tile(
    ptr,
    stride,
    first,
    count,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Pointers [BLOCK, WIDE] to rows from `first` on of [count, D], and which of them to use.

    VECTORS: every row of a head begins at a multiple of 16 bytes. Triton sees that of strides that
    are multiples of 16 elements alone, and would move heads of 72 by single elements.
    """
    rows = first + tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDE)
    pointers = ptr + (rows.to(tl.int64)[:, None] * stride + columns[None, :])
    if VECTORS:
        pointers = tl.multiple_of(pointers, (16, 16))
    mask = (rows < count)[:, None]
    if D != WIDE:
        mask = mask & (columns < D)[None, :]
    return pointers, mask


@triton.jit
def _load_tile(
    ptr,
    stride,
    first,
    count,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Rows `first` to `first + BLOCK` of [count, D] as [BLOCK, WIDE]; zero beyond either end."""
    pointers, mask = _tile(ptr, stride, first, count, BLOCK, D, WIDE, VECTORS)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store_tile(
    ptr,
    tile,
    stride,
    first,
    count,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Write [BLOCK, WIDE] to rows `first` to `first + BLOCK` of [count, D], rounded once."""
    pointers, mask = _tile(ptr, stride, first, count, BLOCK, D, WIDE, VECTORS)
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """Sum acc + a @ b in float32; "interpreted": Triton's interpreter cannot multiply bfloat16."""
    if PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _place(sequence_0, num_blocks, num_heads):
    """(sequence, block, head) of a program; heads vary fastest: they share the rows' pages."""
    program = tl.program_id(0)
    head = (program % num_heads).to(tl.int64)
    rest = program // num_heads
    return sequence_0 + rest // num_blocks, rest % num_blocks, head


@triton.jit
def _bounds(offsets_ptr, sequence):
    """First row of a sequence, int64, and its number of rows."""
    begin = tl.load(offsets_ptr + sequence)
    return begin.to(tl.int64), tl.load(offsets_ptr + sequence + 1) - begin


@triton.jit(do_not_specialize=_VARYING)
def forward_kernel(
    q_ptr,  # [Tq, H, D]
    k_ptr,  # [T, H, D]
    v_ptr,  # [T, H, D]
    out_ptr,  # [Tq, H, D]
    lse_ptr,  # [H, Tq] float32
    q_offsets_ptr,  # [S + 1] int32
    k_offsets_ptr,  # [S + 1] int32
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_lh,
    scale_log2,  # scale * log2(e)
    sequence_0,  # the launch's first sequence
    num_blocks,  # of queries in the launch's longest sequence
    num_heads,
    D: tl.constexpr,  # head dimension
    WIDE: tl.constexpr,  # the power of two at or above it
    VECTORS: tl.constexpr,  # whether rows begin at multiples of 16 bytes
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and lse of a block of queries."""
    sequence, block, head = _place(sequence_0, num_blocks, num_heads)
    q_begin, num_queries = _bounds(q_offsets_ptr, sequence)
    first = block * BLOCK_Q
    if first < num_queries:
        k_begin, num_keys = _bounds(k_offsets_ptr, sequence)
        q_ptr += q_begin * stride_qt + head * stride_qh
        k_ptr += k_begin * stride_kt + head * stride_kh
        v_ptr += k_begin * stride_vt + head * stride_vh
        q = _load_tile(q_ptr, stride_qt, first, num_queries, BLOCK_Q, D, WIDE, VECTORS)
        highest = tl.full([BLOCK_Q], LOWEST, tl.float32)  # finite: scores of -inf come to no NaN
        total = tl.zeros([BLOCK_Q], tl.float32)
        acc = tl.zeros([BLOCK_Q, WIDE], tl.float32)
        zeros = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        for start in range(0, num_keys, BLOCK_K):
            k = _load_tile(k_ptr, stride_kt, start, num_keys, BLOCK_K, D, WIDE, VECTORS)
            scores = _dot(q, tl.trans(k), zeros, PRECISION) * scale_log2
            inside = start + tl.arange(0, BLOCK_K) < num_keys
            scores = tl.where(inside[None, :], scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            p = tl.exp2(scores - higher[:, None])
            rescale = tl.exp2(highest - higher)
            total = total * rescale + tl.sum(p, 1)
            v = _load_tile(v_ptr, stride_vt, start, num_keys, BLOCK_K, D, WIDE, VECTORS)
            acc = acc * rescale[:, None]
            acc = _dot(p.to(v.dtype), v, acc, PRECISION)
            highest = higher
        # A query without keys has the output 0 and lse = -inf.
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out_ptr += q_begin * stride_ot + head * stride_oh
        _store_tile(out_ptr, out, stride_ot, first, num_queries, BLOCK_Q, D, WIDE, VECTORS)
        rows = first + tl.arange(0, BLOCK_Q)
        lse = (highest + tl.log2(total)) * LN_2
        tl.store(lse_ptr + head * stride_lh + q_begin + rows, lse, mask=rows < num_queries)


@triton.jit(do_not_specialize=_VARYING)
def backward_queries_kernel(
    d_out_ptr,  # [Tq, H, D]
    out_ptr,  # [Tq, H, D]
    q_ptr,  # [Tq, H, D]
    k_ptr,  # [T, H, D]
    v_ptr,  # [T, H, D]
    lse_ptr,  # [H, Tq] float32
    delta_ptr,  # [H, Tq] float32, written: sums of d_out * out over channels
    d_q_ptr,  # [Tq, H, D], written
    q_offsets_ptr,  # [S + 1] int32
    k_offsets_ptr,  # [S + 1] int32
    stride_gt,  # of d_out
    stride_gh,
    stride_ot,
    stride_oh,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dt,  # of d_q
    stride_dh,
    stride_lh,  # of lse
    stride_eh,  # of delta
    scale,
    scale_log2,
    sequence_0,
    num_blocks,
    num_heads,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a block of queries, and its sums for `backward_keys_kernel`."""
    sequence, block, head = _place(sequence_0, num_blocks, num_heads)
    q_begin, num_queries = _bounds(q_offsets_ptr, sequence)
    first = block * BLOCK_Q
    if first < num_queries:
        k_begin, num_keys = _bounds(k_offsets_ptr, sequence)
        d_out_ptr += q_begin * stride_gt + head * stride_gh
        out_ptr += q_begin * stride_ot + head * stride_oh
        q_ptr += q_begin * stride_qt + head * stride_qh
        k_ptr += k_begin * stride_kt + head * stride_kh
        v_ptr += k_begin * stride_vt + head * stride_vh
        rows = first + tl.arange(0, BLOCK_Q)
        d_out = _load_tile(d_out_ptr, stride_gt, first, num_queries, BLOCK_Q, D, WIDE, VECTORS)
        out = _load_tile(out_ptr, stride_ot, first, num_queries, BLOCK_Q, D, WIDE, VECTORS)
        delta = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1)
        delta_ptr += head * stride_eh + q_begin
        tl.store(delta_ptr + rows, delta, mask=rows < num_queries)
        lse_ptr += head * stride_lh + q_begin
        lse = tl.load(lse_ptr + rows, mask=rows < num_queries, other=0.0) * LOG2_E
        q = _load_tile(q_ptr, stride_qt, first, num_queries, BLOCK_Q, D, WIDE, VECTORS)
        d_q = tl.zeros([BLOCK_Q, WIDE], tl.float32)
        zeros = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        for start in range(0, num_keys, BLOCK_K):
            k = _load_tile(k_ptr, stride_kt, start, num_keys, BLOCK_K, D, WIDE, VECTORS)
            v = _load_tile(v_ptr, stride_vt, start, num_keys, BLOCK_K, D, WIDE, VECTORS)
            scores = _dot(q, tl.trans(k), zeros, PRECISION) * scale_log2
            d_p = _dot(d_out, tl.trans(v), zeros, PRECISION)
            # A masked key has the score 0, whose p may overflow: it must not meet the zeros of k.
            inside = start + tl.arange(0, BLOCK_K) < num_keys
            p = tl.where(inside[None, :], tl.exp2(scores - lse[:, None]), 0.0)
            d_scores = (p * (d_p - delta[:, None])).to(k.dtype)
            d_q = _dot(d_scores, k, d_q, PRECISION)
        d_q_ptr += q_begin * stride_dt + head * stride_dh
        _store_tile(d_q_ptr, d_q * scale, stride_dt, first, num_queries, BLOCK_Q, D, WIDE, VECTORS)


@triton.jit(do_not_specialize=_VARYING)
def backward_keys_kernel(
    d_out_ptr,  # [Tq, H, D]
    q_ptr,  # [Tq, H, D]
    k_ptr,  # [T, H, D]
    v_ptr,  # [T, H, D]
    lse_ptr,  # [H, Tq] float32
    delta_ptr,  # [H, Tq] float32
    d_k_ptr,  # [T, H, D], written
    d_v_ptr,  # [T, H, D], written
    q_offsets_ptr,  # [S + 1] int32
    k_offsets_ptr,  # [S + 1] int32
    stride_gt,  # of d_out
    stride_gh,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_it,  # of d_k
    stride_ih,
    stride_jt,  # of d_v
    stride_jh,
    stride_lh,  # of lse
    stride_eh,  # of delta
    scale,
    scale_log2,
    sequence_0,
    num_blocks,  # of keys in the launch's longest sequence
    num_heads,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a block of keys and of its values."""
    sequence, block, head = _place(sequence_0, num_blocks, num_heads)
    k_begin, num_keys = _bounds(k_offsets_ptr, sequence)
    first = block * BLOCK_K
    if first < num_keys:
        q_begin, num_queries = _bounds(q_offsets_ptr, sequence)
        d_out_ptr += q_begin * stride_gt + head * stride_gh
        q_ptr += q_begin * stride_qt + head * stride_qh
        k_ptr += k_begin * stride_kt + head * stride_kh
        v_ptr += k_begin * stride_vt + head * stride_vh
        lse_ptr += head * stride_lh + q_begin
        delta_ptr += head * stride_eh + q_begin
        k = _load_tile(k_ptr, stride_kt, first, num_keys, BLOCK_K, D, WIDE, VECTORS)
        v = _load_tile(v_ptr, stride_vt, first, num_keys, BLOCK_K, D, WIDE, VECTORS)
        d_k = tl.zeros([BLOCK_K, WIDE], tl.float32)
        d_v = tl.zeros([BLOCK_K, WIDE], tl.float32)
        zeros = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
        for start in range(0, num_queries, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            q = _load_tile(q_ptr, stride_qt, start, num_queries, BLOCK_Q, D, WIDE, VECTORS)
            d_out = _load_tile(d_out_ptr, stride_gt, start, num_queries, BLOCK_Q, D, WIDE, VECTORS)
            lse = tl.load(lse_ptr + rows, mask=rows < num_queries, other=0.0) * LOG2_E
            delta = tl.load(delta_ptr + rows, mask=rows < num_queries, other=0.0)
            # Transposed: keys are rows. A masked query times an infinite key is NaN.
            scores = _dot(k, tl.trans(q), zeros, PRECISION) * scale_log2
            p = tl.where((rows < num_queries)[None, :], tl.exp2(scores - lse[None, :]), 0.0)
            d_v = _dot(p.to(d_out.dtype), d_out, d_v, PRECISION)
            d_p = _dot(v, tl.trans(d_out), zeros, PRECISION)
            d_scores = (p * (d_p - delta[None, :])).to(q.dtype)
            d_k = _dot(d_scores, q, d_k, PRECISION)
        d_k_ptr += k_begin * stride_it + head * stride_ih
        d_v_ptr += k_begin * stride_jt + head * stride_jh
        _store_tile(d_k_ptr, d_k * scale, stride_it, first, num_keys, BLOCK_K, D, WIDE, VECTORS)
        _store_tile(d_v_ptr, d_v, stride_jt, first, num_keys, BLOCK_K, D, WIDE, VECTORS)


@triton.jit(do_not_specialize=_VARYING)
def backward_short_kernel(
    d_out_ptr,  # [Tq, H, D]
    q_ptr,  # [Tq, H, D]
    k_ptr,  # [T, H, D]
    v_ptr,  # [T, H, D]
    d_q_ptr,  # [Tq, H, D], written
    d_k_ptr,  # [T, H, D], written
    d_v_ptr,  # [T, H, D], written
    q_offsets_ptr,  # [S + 1] int32
    k_offsets_ptr,  # [S + 1] int32
    stride_gt,  # of d_out
    stride_gh,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dt,  # of d_q
    stride_dh,
    stride_it,  # of d_k
    stride_ih,
    stride_jt,  # of d_v
    stride_jh,
    scale,
    scale_log2,
    sequence_0,
    num_blocks,  # 1
    num_heads,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of a sequence of one block: the softmax is computed anew from q and k alone."""
    sequence, _, head = _place(sequence_0, num_blocks, num_heads)
    q_begin, num_queries = _bounds(q_offsets_ptr, sequence)
    k_begin, num_keys = _bounds(k_offsets_ptr, sequence)
    d_out_ptr += q_begin * stride_gt + head * stride_gh
    q_ptr += q_begin * stride_qt + head * stride_qh
    k_ptr += k_begin * stride_kt + head * stride_kh
    v_ptr += k_begin * stride_vt + head * stride_vh
    q = _load_tile(q_ptr, stride_qt, 0, num_queries, BLOCK_Q, D, WIDE, VECTORS)
    k = _load_tile(k_ptr, stride_kt, 0, num_keys, BLOCK_K, D, WIDE, VECTORS)
    d_out = _load_tile(d_out_ptr, stride_gt, 0, num_queries, BLOCK_Q, D, WIDE, VECTORS)
    v = _load_tile(v_ptr, stride_vt, 0, num_keys, BLOCK_K, D, WIDE, VECTORS)
    zeros = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    scores = _dot(q, tl.trans(k), zeros, PRECISION) * scale_log2
    # A masked query times an infinite key is NaN.
    inside = (tl.arange(0, BLOCK_Q) < num_queries)[:, None] & (tl.arange(0, BLOCK_K) < num_keys)
    scores = tl.where(inside, scores, -1e30)  # finite: without any key, too, no NaN comes up
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    d_p = _dot(d_out, tl.trans(v), zeros, PRECISION)
    delta = tl.sum(p * d_p, 1)
    d_scores = (p * (d_p - delta[:, None])).to(k.dtype)
    rows = tl.zeros([BLOCK_Q, WIDE], tl.float32)
    d_q = _dot(d_scores, k, rows, PRECISION)
    d_q_ptr += q_begin * stride_dt + head * stride_dh
    _store_tile(d_q_ptr, d_q * scale, stride_dt, 0, num_queries, BLOCK_Q, D, WIDE, VECTORS)
    rows = tl.zeros([BLOCK_K, WIDE], tl.float32)
    # Masked queries have even weights and meet the zeros of d_out.
    d_v = _dot(tl.trans(p.to(d_out.dtype)), d_out, rows, PRECISION)
    d_v_ptr += k_begin * stride_jt + head * stride_jh
    _store_tile(d_v_ptr, d_v, stride_jt, 0, num_keys, BLOCK_K, D, WIDE, VECTORS)
    d_k = _dot(tl.trans(d_scores), q, rows, PRECISION)
    d_k_ptr += k_begin * stride_it + head * stride_ih
    _store_tile(d_k_ptr, d_k * scale, stride_it, 0, num_keys, BLOCK_K, D, WIDE, VECTORS)
