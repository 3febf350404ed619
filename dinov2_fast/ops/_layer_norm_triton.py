"""The layer norm's Triton kernels, called as `_layer_norm_native` calls those of the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dinov2_fast.ops._triton import device_of, why_not_rows

MAX_CHANNELS = 8192  # a row must fit in the registers of a program


def why_not_triton_layer_norm(
    matrices: Mapping[str, Tensor], vectors: Mapping[str, Tensor], rows: Tensor | None
) -> str:
    """Why the Triton kernels cannot take these tensors, or ""; the vectors are floats."""
    channels = next(iter(matrices.values())).shape[-1]
    if channels > MAX_CHANNELS:
        return f"it takes at most {MAX_CHANNELS} channels, got {channels}"
    return why_not_rows("triton", {**matrices, **vectors}, {**vectors, "rows": rows})


def forward_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    rows: Tensor | None,
    out_dtype: torch.dtype,
    *,
    want_mean: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Forward: y [R, C] in out_dtype, rstd [R], and the mean [R] if wanted."""
    from dinov2_fast.kernels import layer_norm as kernels

    num_rows, channels = (x if rows is None else rows).shape[0], x.shape[1]
    y = x.new_empty((num_rows, channels), dtype=out_dtype)
    rstd = x.new_empty(num_rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if want_mean else None
    with device_of(x):
        kernels.forward(x, weight, bias, eps, rows, y, mean, rstd)
    return y, rstd, mean


def backward_of_output_triton(
    dx: Tensor,
    dy: Tensor,
    source: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Tensor | None,
    *,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    """Adds to dx; `source` is the output, or the normalised input."""
    from dinov2_fast.kernels import layer_norm as kernels

    shift = None if normalised else bias
    with device_of(dx):
        sums = kernels.backward(dx, dy, source, None, rstd, weight, shift, None, rows, add=True)
    return _separate(sums, weight)


def backward_of_input_triton(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the selected rows [R, C], of weight and of bias."""
    from dinov2_fast.kernels import layer_norm as kernels

    dx = dy.new_empty(dy.shape, dtype=x.dtype)
    with device_of(dx):
        sums = kernels.backward(dx, dy, x, mean, rstd, weight, None, rows, None, add=False)
    return dx, *_separate(sums, weight)


def _separate(sums: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias; outputs of an op must not share storage."""
    return sums[0].to(weight.dtype, copy=True), sums[1].to(weight.dtype, copy=True)
