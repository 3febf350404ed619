"""Sinkhorn-Knopp: teacher scores become targets that use every prototype equally often.

With M = exp(logits / temperature), the targets are diag(v) M diag(u): only the two vectors are
stored, as logarithms, so nothing overflows whatever the size of the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dinov2_fast.backends import choose_backend
from dinov2_fast.distributed import all_reduce_max, all_reduce_sum
from dinov2_fast.ops._checks import accumulation_dtype, check_positive, check_tensor
from dinov2_fast.ops._declare import declare
from dinov2_fast.ops._native import run_native
from dinov2_fast.ops._native_cpu import (
    BLOCK_ROWS,
    FLOATS,
    NATIVE_DEVICES,
    dtype_name,
    on_cuda,
    refusals,
    run_cpu,
)
from dinov2_fast.ops._native_cuda import row_blocks, row_splits
from dinov2_fast.ops._triton import TRITON_DEVICES, device_of, triton_refusals

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed import ProcessGroup

    from dinov2_fast.ops._native_cpu import Argument

_ROW_BATCH = 4  # rows that a thread of the CUDA kernels takes at a time


def sinkhorn_reference(
    logits: Tensor, *, temperature: float, num_iterations: int, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Alternate between equal column sums across all processes and row sums of 1.

    The factors 1/K and 1/R of the textbook cancel, so the number of rows need not be known.

    Args:
        logits: [R, K].
        temperature: divides the logits.
        num_iterations: rounds.
        group: processes whose rows count together.
    Returns:
        log_u [K] and log_v [R].
    """
    scores = torch.empty(logits.shape, dtype=accumulation_dtype(logits), device=logits.device)
    log_v = scores.new_zeros(logits.shape[0])
    log_u = scores.new_zeros(logits.shape[1])
    for _ in range(num_iterations):
        torch.add(log_v.unsqueeze(1), logits, alpha=1 / temperature, out=scores)
        log_u = -_log_column_sums_(scores, group)
        torch.add(log_u, logits, alpha=1 / temperature, out=scores)
        log_v = -scores.logsumexp(dim=1)
    return log_u, log_v


@torch.no_grad()
def sinkhorn(
    logits: Tensor,
    *,
    temperature: float,
    num_iterations: int = 3,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Vectors that make exp(logits / temperature + log_u + log_v[:, None]) balanced targets.

    Adding a constant to all logits, to a row or to a column changes no target. Rows that are only
    padding must be cut off before the call.

    Args:
        logits: [R, K] teacher scores of this process; R may differ between processes and be 0.
        temperature: divides the logits.
        num_iterations: rounds; the last step makes every row sum to 1.
        group: processes whose rows count together; None is all of them.
        backend: see `backends.choose_backend`.
    Returns:
        log_u [K], the same on every process, and log_v [R]; float32 (float64 for float64 logits),
        without gradient.
    Raises:
        TypeError: logits not floating-point.
        ValueError: wrong shape, temperature <= 0, no iteration.
        BackendUnavailable: the explicit backend cannot compute this call.
    Source: Cuturi, "Sinkhorn distances", 2013; Caron et al., "SwAV", 2020, for its use here.
    """
    check_tensor("sinkhorn", "logits", logits, "R", "K")
    check_positive("sinkhorn", temperature=temperature)
    if num_iterations < 1:
        raise ValueError(f"sinkhorn: num_iterations must be at least 1, got {num_iterations}")
    refused = refusals({"logits": logits}, {}, floats=(*FLOATS, torch.float16))
    refused |= triton_refusals({"logits": logits}, {})
    chosen = choose_backend("sinkhorn", logits, backend, refusals=refused)
    if chosen == "reference":
        return sinkhorn_reference(
            logits, temperature=temperature, num_iterations=num_iterations, group=group
        )
    log_u = logits.new_zeros(logits.shape[1], dtype=torch.float32)
    log_v = logits.new_zeros(logits.shape[0], dtype=torch.float32)
    if chosen == "native" and not on_cuda(logits):
        return _by_balancing(logits, log_u, log_v, 1 / temperature, num_iterations, group)
    for _ in range(num_iterations):
        largest, sums = _columns(logits, log_v, 1 / temperature, chosen)
        log_u = -_log_sums_of_all(largest, sums, group)
        log_v = -_rows(logits, log_u, 1 / temperature, chosen)
    return log_u, log_v


def _by_balancing(
    logits: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    scale: float,
    num_iterations: int,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """`sinkhorn` in one pass an iteration and one before the first.

    The first step over the columns looks for their largest scores. After it every column has a
    target of at least 1 / (R K), so that later sums need none: they are those of targets.
    """
    largest, sums = _columns(logits, log_v, scale, "native")
    log_u = log_u - _log_sums_of_all(largest, sums, group)
    for left in reversed(range(num_iterations)):
        log_v, sums = _balance(logits, log_u, log_v, scale, left > 0, "native")
        if left > 0:
            sums = all_reduce_sum(sums, group)
            log_u = log_u - sums.masked_fill_(sums == 0, 1.0).log_()
    return log_u, log_v


@torch.no_grad()
def row_logsumexp(
    logits: Tensor, log_u: Tensor, *, temperature: float, backend: str | None = None
) -> Tensor:
    """Logarithm of each row's sum of exp(logits / temperature + log_u): half a Sinkhorn round.

    Args:
        logits: [R, K] scores.
        log_u: [K] float32 (float64 for float64 logits), one term per column.
        temperature: divides the logits.
        backend: see `backends.choose_backend`.
    Returns:
        [R] in the dtype of log_u, without gradient.
    Raises:
        TypeError: not floating-point tensors.
        ValueError: wrong shape, or temperature <= 0.
        BackendUnavailable: the explicit backend cannot compute this call.
    """
    check_tensor("row_logsumexp", "logits", logits, "R", "K")
    check_tensor("row_logsumexp", "log_u", log_u, logits.shape[1])
    check_positive("row_logsumexp", temperature=temperature)
    refused = refusals({"logits": logits}, {}, floats=(*FLOATS, torch.float16))
    if log_u.dtype != torch.float32:
        refused = {"native": f"log_u must be float32, got {log_u.dtype}"}
    chosen = choose_backend("sinkhorn", logits, backend, refusals=refused)
    if chosen == "reference":
        return torch.logsumexp(logits.to(log_u.dtype) / temperature + log_u, dim=1)
    return _rows(logits, log_u, 1 / temperature, chosen)


def _log_column_sums_(scores: Tensor, group: ProcessGroup | None) -> Tensor:
    """Logarithm of each column's sum of exp(scores) over all processes: [K]; overwrites scores.

    A column without any weight, as when no process has a row, counts as 1.
    """
    rows, columns = scores.shape
    largest = scores.amax(dim=0) if rows else scores.new_full((columns,), -torch.inf)
    all_reduce_max(largest, group)
    empty = largest == -torch.inf
    largest.masked_fill_(empty, 0.0)
    sums = all_reduce_sum(scores.sub_(largest).exp_().sum(dim=0), group)
    return sums.masked_fill_(empty, 1.0).log_().add_(largest)


def _log_sums_of_all(largest: Tensor, sums: Tensor, group: ProcessGroup | None) -> Tensor:
    """`_log_column_sums_` out of each process's own largest scores [K] and sums relative to them.

    The sums are brought to the largest score of all processes before they are added.
    """
    common = all_reduce_max(largest.clone(), group)
    empty = common == -torch.inf
    common.masked_fill_(empty, 0.0)
    sums = all_reduce_sum(sums * (largest - common).exp(), group)
    # A column of NaN alone has no largest score either, and must not pass for an empty one.
    return sums.masked_fill_(empty & (sums == 0), 1.0).log_().add_(common)


def _columns_native(logits: Tensor, log_v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Largest of logits * scale + log_v in each column, and sum of exp relative to it."""
    largest, sums = _columns_fake(logits, log_v, scale)
    num_partials = max(row_blocks(*logits.shape, batch=_ROW_BATCH), 1)
    run_native(
        "sinkhorn_columns",
        logits=logits,
        log_v=log_v,
        largest=largest,
        sums=sums,
        rows=logits.shape[0],
        columns=logits.shape[1],
        row_stride=logits.stride(0),
        scale=scale,
        dtype=dtype_name(logits),
        **_parts(logits, "num_partials", num_partials, num_partials * logits.shape[1]),
    )
    return largest, sums


def _rows_native(logits: Tensor, log_u: Tensor, scale: float) -> Tensor:
    """Logarithm of each row's sum of exp(logits * scale + log_u)."""
    lse = _rows_fake(logits, log_u, scale)
    num_splits = row_splits(-(-logits.shape[0] // _ROW_BATCH), logits.shape[1])
    run_native(
        "sinkhorn_rows",
        logits=logits,
        log_u=log_u,
        lse=lse,
        rows=logits.shape[0],
        columns=logits.shape[1],
        row_stride=logits.stride(0),
        scale=scale,
        dtype=dtype_name(logits),
        **_parts(logits, "num_splits", num_splits, num_splits * logits.shape[0]),
    )
    return lse


def _balance_cpu(
    logits: Tensor, log_u: Tensor, log_v: Tensor, scale: float, want_sums: bool
) -> tuple[Tensor, Tensor]:
    """The log_v that makes rows of targets sum to 1; if wanted, the columns' sums of these."""
    next_v, sums = _balance_fake(logits, log_u, log_v, scale, want_sums)
    rows, columns = logits.shape
    run_cpu(
        "sinkhorn_balance_cpu",
        logits=logits,
        log_u=log_u,
        log_v=log_v,
        next_v=next_v,
        sums=sums if want_sums else None,
        scratch=log_u.new_empty((2, -(-rows // BLOCK_ROWS), columns)),
        rows=rows,
        columns=columns,
        block_rows=BLOCK_ROWS,
        row_stride=logits.stride(0),
        scale=scale,
        dtype=dtype_name(logits),
    )
    return next_v, sums


def _parts(logits: Tensor, name: str, count: int, num_sums: int) -> Mapping[str, Argument]:
    """On a GPU the number of parts that sums are cut into, and scratch for them if there are two.

    Args:
        logits: what is summed over.
        name: of the number.
        count: the number.
        num_sums: sums of all parts.
    """
    if not on_cuda(logits):
        return {}
    sums = logits.new_empty((2, num_sums), dtype=torch.float32) if count > 1 else None
    return {name: count, "partials": sums}


def _columns_triton(logits: Tensor, log_v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `_columns_native`, by Triton."""
    from dinov2_fast.kernels import sinkhorn as kernels

    largest, sums = _columns_fake(logits, log_v, scale)
    with device_of(logits):
        kernels.columns(logits, log_v, scale, largest, sums)
    return largest, sums


def _rows_triton(logits: Tensor, log_u: Tensor, scale: float) -> Tensor:
    """As `_rows_native`, by Triton."""
    from dinov2_fast.kernels import sinkhorn as kernels

    lse = _rows_fake(logits, log_u, scale)
    with device_of(logits):
        kernels.rows(logits, log_u, scale, lse)
    return lse


def _columns_fake(logits: Tensor, log_v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    largest = log_v.new_empty(logits.shape[1])
    return largest, torch.empty_like(largest)


def _rows_fake(logits: Tensor, log_u: Tensor, scale: float) -> Tensor:
    return log_u.new_empty(logits.shape[0])


def _balance_fake(
    logits: Tensor, log_u: Tensor, log_v: Tensor, scale: float, want_sums: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(log_v), log_u.new_empty(logits.shape[1] if want_sums else 0)


_balance = declare(
    "sinkhorn_balance(Tensor logits, Tensor log_u, Tensor log_v, float scale, bool want_sums, "
    "str backend) -> (Tensor, Tensor)",
    kernels={("native", "cpu"): _balance_cpu},
    fake=_balance_fake,
)
_columns = declare(
    "sinkhorn_columns(Tensor logits, Tensor log_v, float scale, str backend) -> (Tensor, Tensor)",
    kernels={
        **dict.fromkeys(NATIVE_DEVICES, _columns_native),
        **dict.fromkeys(TRITON_DEVICES, _columns_triton),
    },
    fake=_columns_fake,
)
_rows = declare(
    "sinkhorn_rows(Tensor logits, Tensor log_u, float scale, str backend) -> Tensor",
    kernels={
        **dict.fromkeys(NATIVE_DEVICES, _rows_native),
        **dict.fromkeys(TRITON_DEVICES, _rows_triton),
    },
    fake=_rows_fake,
)
