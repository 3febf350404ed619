"""Layer normalisation, optionally of a subset of rows that is gathered on the way."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.backends import choose_backend
from dinov2_fast.ops._checks import (
    accumulation_dtype,
    check_device,
    check_positive,
    check_rows,
    check_tensor,
)


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, rows: Tensor | None = None
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    Args:
        x: [T, C].
        weight: [C].
        bias: [C].
        eps: added to the variance.
        rows: [R] int64 rows of x to normalise; None is all of them.
    Returns:
        [R, C], or [T, C] without rows.
    """
    if rows is not None:
        x = x.index_select(0, rows)  # [R, C]
    if weight.dtype == x.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Layer normalisation over the last dimension, of all rows or of some.

    Args:
        x: [T, C]; without `rows` any number of leading dimensions.
        weight: [C], in the dtype of x or in float32.
        bias: [C], in the dtype of weight.
        eps: added to the variance.
        rows: [R] int64 rows of x to normalise, for instance those a residual branch keeps; None is
            all of them.
        backend: see `backends.choose_backend`.
    Returns:
        [R, C] in the dtype of x; the shape of x without `rows`.
    Raises:
        TypeError: not floating-point tensors, or rows that are not int64.
        ValueError: shapes, dtypes or devices that do not fit, eps <= 0, rows out of range.
        BackendUnavailable: the explicit backend cannot compute this call.
    Source: Ba, Kiros, Hinton, "Layer normalization", 2016.
    """
    _check(x, weight, bias, eps, rows)
    choose_backend("layer_norm", x, backend)  # raises for what has no kernel
    return layer_norm_reference(x, weight, bias, eps=eps, rows=rows)


def _check(x: Tensor, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None) -> None:
    """Refuse wrong arguments."""
    check_tensor("layer_norm", "weight", weight, "C")
    check_tensor("layer_norm", "bias", bias, *weight.shape)
    leading = ("T",) * (x.ndim - 1) if isinstance(x, Tensor) and rows is None else ("T",)  # pyright: ignore[reportUnnecessaryIsInstance]
    check_tensor("layer_norm", "x", x, *leading, weight.shape[0])
    check_device("layer_norm", x.device, weight=weight, bias=bias)
    check_positive("layer_norm", eps=eps, channels=weight.shape[0])
    if bias.dtype != weight.dtype:
        raise ValueError(
            f"layer_norm: bias must have the dtype of weight {weight.dtype}, got {bias.dtype}"
        )
    if weight.dtype not in (x.dtype, accumulation_dtype(x)):
        raise ValueError(
            f"layer_norm: weight must be {x.dtype} like x or {accumulation_dtype(x)}, "
            f"got {weight.dtype}"
        )
    if rows is not None:
        check_rows("layer_norm", "rows", rows, x.shape[0], x.device)
