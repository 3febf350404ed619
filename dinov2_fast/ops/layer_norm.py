"""Layer normalisation, optionally of a subset of rows that is gathered on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.backends import choose_backend
from dinov2_fast.ops._checks import (
    accumulation_dtype,
    check_device,
    check_positive,
    check_row_range,
    check_rows,
    check_tensor,
)
from dinov2_fast.ops._declare import Kernel, declare
from dinov2_fast.ops._layer_norm_native import (
    backward_of_input_native,
    backward_of_output_native,
    forward_native,
    why_not_native_layer_norm,
)
from dinov2_fast.ops._layer_norm_triton import (
    backward_of_input_triton,
    backward_of_output_triton,
    forward_triton,
    why_not_triton_layer_norm,
)
from dinov2_fast.ops._native_cpu import NATIVE_DEVICES, adjacent_columns, why_not_overlap
from dinov2_fast.ops._triton import TRITON_DEVICES, why_not_rows


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


def layer_norm_forward_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    rows: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`layer_norm_forward` in plain PyTorch: the specification."""
    wide = accumulation_dtype(x)
    selected = (x if rows is None else x.index_select(0, rows)).to(wide)  # [R, C]
    centred = selected - selected.mean(dim=1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + eps)  # [R, 1]
    y = centred * rstd * weight + bias
    return y.to(out_dtype or x.dtype), rstd.squeeze(1).to(wide)


def layer_norm_backward_reference_(
    dx: Tensor,
    dy: Tensor,
    y: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    rows: Tensor | None = None,
    normalised: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`layer_norm_backward_` in plain PyTorch: the specification."""
    wide = accumulation_dtype(dx, rstd)
    x_hat = (y.to(wide) - bias) / weight if normalised is None else normalised.to(wide)  # [R, C]
    incoming = dy.to(wide)
    g = incoming * weight
    along = (g * x_hat).mean(dim=1, keepdim=True)  # [R, 1]
    gradient = rstd.unsqueeze(1) * (g - g.mean(dim=1, keepdim=True) - x_hat * along)
    if rows is None:
        dx.add_(gradient)
    else:
        dx.index_add_(0, rows, gradient.to(dx.dtype))
    dweight, dbias = (incoming * x_hat).sum(dim=0), incoming.sum(dim=0)
    return dweight.to(weight.dtype), dbias.to(weight.dtype)


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
    why_not = _why_not(x, weight, bias, rows, x.dtype)
    chosen = choose_backend("layer_norm", x, backend, refusals=why_not)
    if chosen == "reference":
        check_row_range("layer_norm", "rows", rows, x.shape[0])
        return layer_norm_reference(x, weight, bias, eps=eps, rows=rows)
    matrix = x if x.ndim == 2 else x.view(-1, weight.shape[0])
    y, _, _ = _forward(matrix, weight, bias, eps, rows, chosen)
    return y if x.ndim == 2 else y.view(x.shape)


def layer_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    rows: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm and what its backward needs, without autograd: for a caller with its own backward.

    Args:
        x: [T, C].
        weight: [C], in the dtype of x or in float32.
        bias: [C], in the dtype of weight.
        eps: added to the variance.
        rows: [R] int64 rows of x to normalise; None is all of them.
        out_dtype: of y; None is that of x.
        backend: see `backends.choose_backend`.
    Returns:
        y [R, C], and rstd [R], 1 / sqrt(variance + eps) in float32 (float64 for float64 x).
    Raises:
        TypeError, ValueError, BackendUnavailable: as `layer_norm`.
    """
    _check(x, weight, bias, eps, rows)
    y_dtype = out_dtype or x.dtype
    why_not = _why_not(x, weight, bias, rows, y_dtype)
    chosen = choose_backend("layer_norm", x, backend, refusals=why_not)
    if chosen == "reference":
        check_row_range("layer_norm", "rows", rows, x.shape[0])
        return layer_norm_forward_reference(
            x, weight, bias, eps=eps, rows=rows, out_dtype=out_dtype
        )
    run = forward_triton if chosen == "triton" else forward_native
    y, rstd, _ = run(x, weight, bias, eps, rows, y_dtype, want_mean=False)
    return y, rstd


def layer_norm_backward_(
    dx: Tensor,
    dy: Tensor,
    y: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    rows: Tensor | None = None,
    normalised: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the gradient of the norm's input to dx in place; without autograd.

    The normalised input is rebuilt from the output, (y - bias) / weight, so that the input need
    not be kept; see `can_rebuild`.

    Args:
        dx: [T, C]; its rows `rows` are added to.
        dy: [R, C] gradient of y.
        y: [R, C] output of `layer_norm_forward`; not read when `normalised` is given.
        rstd: [R] of `layer_norm_forward`.
        weight: [C].
        bias: [C].
        rows: [R] int64 rows of dx, no row twice; None is all of them.
        normalised: [R, C] (x - mean) * rstd, used instead of rebuilding it: the forward of weight
            1 and bias 0.
        backend: see `backends.choose_backend`.
    Returns:
        Gradients of weight and bias, [C] in the dtype of weight. Kernels sum in a fixed order,
        whatever the number of threads.
    Raises:
        TypeError: not floating-point tensors, or rows that are not int64.
        ValueError: shapes or devices that do not fit, rows out of range.
        BackendUnavailable: the explicit backend cannot compute this call.
    """
    _check_backward(dx, dy, y, rstd, weight, bias, rows, normalised)
    source = y if normalised is None else normalised
    matrices = {"dx": dx, "dy": dy, "source": source}
    vectors = {"rstd": rstd, "weight": weight, "bias": bias}

    def why_not(name: str) -> str:
        overlap = why_not_overlap("dx", dx)
        if overlap or name == "triton":
            return overlap or why_not_triton_layer_norm(matrices, vectors, rows)
        return why_not_rows(
            name, {**matrices, **vectors}, {**vectors, "rows": rows}
        ) or why_not_native_layer_norm(dx, dy.dtype, source)

    chosen = choose_backend("layer_norm", dx, backend, refusals=why_not)
    if chosen == "reference":
        check_row_range("layer_norm_backward_", "rows", rows, dx.shape[0])
        return layer_norm_backward_reference_(
            dx, dy, y, rstd, weight, bias, rows=rows, normalised=normalised
        )
    run = backward_of_output_triton if chosen == "triton" else backward_of_output_native
    return run(dx, dy, source, rstd, weight, bias, rows, normalised=normalised is not None)


def can_rebuild(weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the normalised input is well-conditioned in the output: x_hat = (y - bias) / weight.

    Args:
        weight: [C].
        bias: [C]; with it, channels whose bias outweighs 8 times the weight count as ill too:
            y's rounding, relative to the bias, grows by that ratio.
    Returns:
        False if some |weight| is below 1 % of the largest (or is not finite, or 0). Waits for the
        device.
    """
    size = weight.detach().abs()
    well = (size >= 1e-2 * size.amax()) & (size > 0) & size.isfinite()
    if bias is not None:
        well &= bias.detach().abs() <= 8 * size
    return bool(well.all())


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
        check_rows("layer_norm", "rows", rows, x.device)


def _check_backward(
    dx: Tensor,
    dy: Tensor,
    y: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Tensor | None,
    normalised: Tensor | None,
) -> None:
    """Refuse wrong arguments of the backward."""
    op = "layer_norm_backward_"
    check_tensor(op, "weight", weight, "C")
    check_tensor(op, "bias", bias, *weight.shape)
    check_tensor(op, "dx", dx, "T", weight.shape[0])
    if rows is not None:
        check_rows(op, "rows", rows, dx.device)
    shape = (dx if rows is None else rows).shape[0], weight.shape[0]
    check_tensor(op, "dy", dy, *shape)
    check_tensor(op, "y", y, *shape)
    check_tensor(op, "rstd", rstd, shape[0])
    if normalised is not None:
        check_tensor(op, "normalised", normalised, *shape)
    check_device(
        op, dx.device, dy=dy, y=y, rstd=rstd, weight=weight, bias=bias, normalised=normalised
    )


def _why_not(
    x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None, out_dtype: torch.dtype
) -> Callable[[str], str]:
    """A function that says why a backend's kernels cannot take a forward's arguments, or ""."""

    def why_not(name: str) -> str:
        if x.ndim != 2 and not x.is_contiguous():
            return f"x must be contiguous or [T, C], got strides {x.stride()}"
        if name == "triton":
            return why_not_triton_layer_norm({"x": x}, {"weight": weight, "bias": bias}, rows)
        vectors = {"weight": weight, "bias": bias, "rows": rows}
        return why_not_native_layer_norm(x, out_dtype) or why_not_rows(name, {"x": x}, vectors)

    return why_not


def _forward_by(run: Kernel) -> Kernel:
    """Forward: y in the dtype of x, mean and rstd."""

    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, rstd, mean = run(x, weight, bias, eps, rows, x.dtype, want_mean=True)
        return y, mean, rstd

    return forward


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = (x if rows is None else rows).shape[0]
    statistics = [x.new_empty(num_rows, dtype=torch.float32) for _ in range(2)]
    return x.new_empty(num_rows, x.shape[1]), statistics[0], statistics[1]


def _backward_by(run: Kernel) -> Kernel:
    """Gradients of x, weight and bias."""

    def backward(
        dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx, dweight, dbias = run(adjacent_columns(dy), x, weight, mean, rstd, rows)
        if rows is not None:  # a row may be selected twice
            dx = x.new_zeros(x.shape).index_add_(0, rows, dx)
        return dx, dweight, dbias

    return backward


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the input and two numbers a row."""
    x, weight, _, _, rows, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd, rows)


def _gradient(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, bias, eps, rows, backend)."""
    x, weight, mean, rstd, rows = ctx.saved_tensors
    gradients = _backward(dy, x, weight, mean, rstd, rows, ctx.backend)
    return *gradients, None, None, None


_backward = declare(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, "
    "Tensor? rows, str backend) -> (Tensor, Tensor, Tensor)",
    kernels={
        **dict.fromkeys(NATIVE_DEVICES, _backward_by(backward_of_input_native)),
        **dict.fromkeys(TRITON_DEVICES, _backward_by(backward_of_input_triton)),
    },
    fake=_backward_fake,
)
_forward = declare(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? rows, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    kernels={
        **dict.fromkeys(NATIVE_DEVICES, _forward_by(forward_native)),
        **dict.fromkeys(TRITON_DEVICES, _forward_by(forward_triton)),
    },
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)
