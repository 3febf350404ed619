"""Stochastic depth that skips work: a residual branch sees only the samples it keeps.

The kept rows are gathered, the branch runs on them alone, and its output is added back into the
residual stream, scaled so that the expected sum does not change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dinov2_fast.backends import choose_backend
from dinov2_fast.ops._checks import (
    accumulation_dtype,
    check_device,
    check_row_range,
    check_rows,
    check_tensor,
)
from dinov2_fast.ops._native_cpu import native_floats, why_not_overlap, why_not_pair
from dinov2_fast.ops._stochastic_depth_native import (
    gather_native,
    gather_op,
    scatter_native_,
    scatter_op,
)
from dinov2_fast.ops._stochastic_depth_triton import gather_triton, scatter_triton_
from dinov2_fast.ops._triton import why_not_rows
from dinov2_fast.packing import Pack


@dataclass(frozen=True)
class KeptRows:
    """The samples a residual branch is computed for.

    Args:
        rows: [R] int64 token rows of the kept sequences, ascending, no row twice.
        row_scale: [R] float32, b / m of the row's group: b samples, m of them kept.
        pack: layout of the R rows.
    """

    rows: Tensor
    row_scale: Tensor
    pack: Pack


def gather_rows_reference(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x: [T, C] -> [R, C]."""
    return x.index_select(0, rows)


def scatter_add_scaled_reference(
    x: Tensor, residual: Tensor, rows: Tensor, row_scale: Tensor, gamma: Tensor | None
) -> Tensor:
    """A copy of x with residual * row_scale * gamma added to its rows; arguments as below."""
    update = residual * row_scale.unsqueeze(1)  # [R, C]
    if gamma is not None:
        update = update * gamma
    return x.index_add(0, rows, update.to(x.dtype))


def scatter_add_scaled_reference_(
    x: Tensor,
    residual: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    gamma: Tensor | None,
) -> None:
    """`scatter_add_scaled_` in plain PyTorch: the specification."""
    update = residual.to(accumulation_dtype(x))  # [R, C]
    if row_scale is not None:
        update = update * row_scale.unsqueeze(1)
    if gamma is not None:
        update = update * gamma
    if rows is None:
        x.add_(update)
    else:
        x.index_add_(0, rows, update.to(x.dtype))


def gather_scaled_reference(
    dx: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`gather_scaled` in plain PyTorch: the specification."""
    g = (dx if rows is None else dx.index_select(0, rows)).to(accumulation_dtype(dx))  # [R, C]
    if row_scale is not None:
        g = g * row_scale.unsqueeze(1)
    return g.to(out_dtype or dx.dtype), g.sum(dim=0)


def keep_count(batch_size: int, drop_ratio: float) -> int:
    """Number of samples of a group that a residual branch is computed for.

    Args:
        batch_size: b, samples in the group.
        drop_ratio: share of samples skipped, in [0, 1).
    Returns:
        int(b * (1 - drop_ratio)), at least 1 unless the group is empty: a branch without samples
        would leave its parameters without gradients on this process only.
    Raises:
        ValueError: a negative batch size, or a ratio outside [0, 1).
    Source: Oquab et al., "DINOv2", 2023, section 5, and its training code for the rounding.
    """
    if batch_size < 0:
        raise ValueError(f"keep_count: batch_size must be at least 0, got {batch_size}")
    if not 0 <= drop_ratio < 1:
        raise ValueError(f"keep_count: drop_ratio must be in [0, 1), got {drop_ratio}")
    return min(batch_size, max(int(batch_size * (1 - drop_ratio)), 1))


def draw_kept_rows(
    pack: Pack, drop_ratio: float, generator: torch.Generator | None
) -> KeptRows | None:
    """Draw which sequences a residual branch keeps; every group of the pack draws on its own.

    Args:
        pack: layout of the tokens; one group is one crop size.
        drop_ratio: share of sequences skipped, in [0, 1).
        generator: CPU generator, so that the draw is the same on every device; None is torch's
            global one.
    Returns:
        The kept rows on the device of the pack; None if nothing is dropped. How many rows there
        are depends on the pack and the ratio alone.
    Raises:
        ValueError: a ratio outside [0, 1), or a generator of another device.
    """
    counts = [keep_count(count, drop_ratio) for count, _ in pack.groups]
    if drop_ratio == 0:
        return None
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(
            f"draw_kept_rows: generator must be on the cpu, got {generator.device}; "
            "use torch.Generator()"
        )
    rows: list[Tensor] = []
    scales: list[Tensor] = []
    begin = 0
    for (count, length), kept in zip(pack.groups, counts, strict=True):
        chosen = torch.randperm(count, generator=generator)[:kept].sort().values  # [m]
        first = (begin + chosen * length).to(pack.device)
        within = torch.arange(length, device=pack.device)
        rows.append((first.unsqueeze(1) + within).flatten())  # [m * N]
        scale = count / kept if kept else 1.0
        scales.append(torch.full((kept * length,), scale, device=pack.device))
        begin += count * length
    if not rows:
        rows, scales = [torch.empty(0, dtype=torch.int64)], [torch.empty(0)]
    runs = [(kept, length) for (_, length), kept in zip(pack.groups, counts, strict=True)]
    return KeptRows(
        rows=torch.cat(rows).to(pack.device),
        row_scale=torch.cat(scales).to(pack.device, torch.float32),
        pack=Pack.from_groups(runs, pack.device),
    )


def gather_rows(x: Tensor, rows: Tensor, *, backend: str | None = None) -> Tensor:
    """The rows a residual branch keeps.

    Args:
        x: [T, C] tokens.
        rows: [R] int64.
        backend: see `backends.choose_backend`.
    Returns:
        [R, C].
    Raises:
        TypeError: x not floating-point, or rows not int64.
        ValueError: wrong shapes or devices, or rows out of range.
        BackendUnavailable: the explicit backend cannot compute this call.
    """
    check_tensor("gather_rows", "x", x, "T", "C")
    check_rows("gather_rows", "rows", rows, x.device)
    chosen = choose_backend(
        "stochastic_depth",
        x,
        backend,
        refusals=lambda name: why_not_rows(name, {"x": x}, {"rows": rows}),
    )
    if chosen == "reference":
        check_row_range("gather_rows", "rows", rows, x.shape[0])
        return gather_rows_reference(x, rows)
    return gather_op(x, rows, chosen)


def scatter_add_scaled(
    x: Tensor,
    residual: Tensor,
    rows: Tensor,
    row_scale: Tensor,
    gamma: Tensor | None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Add a branch's output back into the residual stream: x[rows] + residual * row_scale * gamma.

    Args:
        x: [T, C] residual stream; not changed.
        residual: [R, C] output of the branch, in any floating-point type.
        rows: [R] int64 rows of x, no row twice.
        row_scale: [R] float32; carries no gradient.
        gamma: [C] LayerScale vector; None is all ones.
        backend: see `backends.choose_backend`.
    Returns:
        [T, C] in the dtype of x; the sum's terms are computed in the wider of the types.
    Raises:
        TypeError: tensors that are not floating-point, or rows not int64.
        ValueError: shapes or devices that do not fit, or rows out of range.
        BackendUnavailable: the explicit backend cannot compute this call.
    """
    _check_scatter("scatter_add_scaled", x, residual, rows, row_scale, gamma)
    chosen = choose_backend(
        "stochastic_depth",
        x,
        backend,
        refusals=lambda name: _why_not_scatter(name, x, residual, rows, row_scale, gamma),
    )
    if chosen == "reference":
        check_row_range("scatter_add_scaled", "rows", rows, x.shape[0])
        return scatter_add_scaled_reference(x, residual, rows, row_scale.detach(), gamma)
    return scatter_op(x, residual, rows, row_scale.detach(), gamma, chosen)


def scatter_add_scaled_(
    x: Tensor,
    residual: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    gamma: Tensor | None,
    *,
    backend: str | None = None,
) -> None:
    """x[rows] += residual * row_scale * gamma in place; without autograd.

    Args:
        x: [T, C] residual stream; changed.
        residual: [R, C] output of a branch, in any floating-point type.
        rows: [R] int64 rows of x, no row twice; None is all of them.
        row_scale: [R] float32; None is all ones.
        gamma: [C] LayerScale vector; None is all ones.
        backend: see `backends.choose_backend`.
    Raises:
        TypeError: tensors that are not floating-point, or rows not int64.
        ValueError: shapes or devices that do not fit, or rows out of range.
        BackendUnavailable: the explicit backend cannot compute this call.
    """
    _check_scatter("scatter_add_scaled_", x, residual, rows, row_scale, gamma)
    chosen = choose_backend(
        "stochastic_depth",
        x,
        backend,
        refusals=lambda name: (
            why_not_overlap("x", x) or _why_not_scatter(name, x, residual, rows, row_scale, gamma)
        ),
    )
    if chosen == "reference":
        check_row_range("scatter_add_scaled_", "rows", rows, x.shape[0])
        scatter_add_scaled_reference_(x, residual, rows, row_scale, gamma)
    else:
        run_ = scatter_triton_ if chosen == "triton" else scatter_native_
        run_(x, residual, rows, row_scale, gamma, op="scatter_add_scaled_")


def gather_scaled(
    dx: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient that reaches a branch, dx[rows] * row_scale, and its sum; without autograd.

    Args:
        dx: [T, C] gradient of the residual stream.
        rows: [R] int64; None is all rows.
        row_scale: [R] float32; None is all ones.
        out_dtype: of the rows handed back; None is that of dx.
        backend: see `backends.choose_backend`.
    Returns:
        g [R, C] in out_dtype, and its column sums [C] before that rounding, in float32 (float64
        for float64 dx). Kernels sum in a fixed order, whatever the number of threads.
    Raises:
        TypeError: tensors that are not floating-point, or rows not int64.
        ValueError: shapes or devices that do not fit, or rows out of range.
        BackendUnavailable: the explicit backend cannot compute this call.
    """
    op = "gather_scaled"
    check_tensor(op, "dx", dx, "T", "C")
    if rows is not None:
        check_rows(op, "rows", rows, dx.device)
    if row_scale is not None:
        check_tensor(op, "row_scale", row_scale, (dx if rows is None else rows).shape[0])
    check_device(op, dx.device, row_scale=row_scale)
    g_dtype = out_dtype or dx.dtype

    def why_not(name: str) -> str:
        if name == "native" and g_dtype not in native_floats(dx):
            return f"out_dtype must be one of {native_floats(dx)}, got {out_dtype}"
        vectors = {"rows": rows, "row_scale": row_scale}
        return _why_not_types(name, dx, g_dtype, row_scale) or why_not_rows(
            name, {"dx": dx}, vectors
        )

    chosen = choose_backend("stochastic_depth", dx, backend, refusals=why_not)
    if chosen == "reference":
        check_row_range(op, "rows", rows, dx.shape[0])
        return gather_scaled_reference(dx, rows, row_scale, out_dtype=out_dtype)
    run = gather_triton if chosen == "triton" else gather_native
    g, sums = run(dx, rows, row_scale, None, None, g_dtype, want_sums=True, op=op)
    assert sums is not None
    return g, sums


def _check_scatter(
    op: str,
    x: Tensor,
    residual: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    gamma: Tensor | None,
) -> None:
    """Refuse wrong arguments of the scatter."""
    check_tensor(op, "x", x, "T", "C")
    if rows is not None:
        check_rows(op, "rows", rows, x.device)
    num_rows = (x if rows is None else rows).shape[0]
    check_tensor(op, "residual", residual, num_rows, x.shape[1])
    if row_scale is not None:
        check_tensor(op, "row_scale", row_scale, num_rows)
    if gamma is not None:
        check_tensor(op, "gamma", gamma, x.shape[1])
    check_device(op, x.device, residual=residual, row_scale=row_scale, gamma=gamma)


def _why_not_scatter(
    name: str,
    x: Tensor,
    residual: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    gamma: Tensor | None,
) -> str:
    """Why a backend's kernels cannot take the arguments of a scatter, or ""."""
    matrices = {"x": x, "residual": residual, "gamma": gamma}
    vectors = {"rows": rows, "row_scale": row_scale, "gamma": gamma}
    return _why_not_types(name, x, residual.dtype, row_scale) or why_not_rows(
        name, matrices, vectors
    )


def _why_not_types(name: str, stream: Tensor, branch: torch.dtype, row_scale: Tensor | None) -> str:
    """Why a backend takes no such types; all kernels read row scales in float32."""
    if row_scale is not None and row_scale.dtype != torch.float32:
        return f"row_scale must be float32, got {row_scale.dtype}"
    return why_not_pair(stream, branch) if name == "native" else ""
