"""Matrix products with weights, through the fastest library for a type and a processor.

Activations come in the storage type of the step (float32, bfloat16 or float16), weights in float32.
On processors whose bfloat16 dot products are slower than float32 arithmetic, a product of bfloat16
operands is computed in float32 and rounded once: docs/numerics.md.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@functools.cache
def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones.

    True with matrix tiles (AMX), on AMD with AVX-512 dot products and on ARM with bfloat16. Intel's
    AVX-512 dot product without AMX does half of what its float32 units do.
    """
    found = cast("dict[str, Any]", torch.cpu.get_capabilities())
    if found.get("architecture") == "aarch64":
        return bool(found.get("bf16"))
    intel = "intel" in str(found.get("cpu_name", "")).lower()
    return bool(found.get("amx_bf16")) or (bool(found.get("avx512_bf16")) and not intel)


def autocast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` with a graph, in the type autocast asks for.

    Args:
        x: [..., I].
        weight: [O, I].
        bias: [O], or None.
    Returns:
        [..., O].
    """
    plain = x.device.type != "cpu" or x.dtype == torch.float64 or torch.compiler.is_compiling()
    if plain or not torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    rows = x.to(torch.get_autocast_dtype("cpu")).reshape(-1, x.shape[-1])
    y = _Linear.apply(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])  # pyright: ignore[reportAttributeAccessIssue]


class _Linear(torch.autograd.Function):
    """`linear` of rows with its gradients; keeps the rows, in their type, and the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[R, O] of x [R, I]."""
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        d_bias = None if ctx.bias_dtype is None else grad.sum(0, dtype=ctx.bias_dtype)
        return (
            input_gradient(grad, weight) if wants_x else None,
            weight_gradient(grad, x, weight) if wants_weight else None,
            d_bias,
        )


class LowPrecisionCopy:
    """A weight in the type that products take, kept with it so that no product casts it.

    Whoever changes the weight writes the copy and says so; a weight that changed without is cast at
    every product until then.

    Args:
        weight: [O, I] parameter; the copy hangs on it as `low_precision`.
        dtype: of the copy.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.tensor = weight.detach().to(dtype)
        self._version = weight._version
        weight.low_precision = self  # pyright: ignore[reportAttributeAccessIssue]

    def mark_written(self, weight: Tensor) -> None:
        """Note that the copy holds what the weight holds now."""
        self._version = weight._version

    def is_current(self, weight: Tensor) -> bool:
        """Whether the weight has not changed since the copy was written."""
        return self._version == weight._version


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in a type: its copy if that is current."""
    copy = getattr(weight, "low_precision", None)
    if copy is not None and copy.tensor.dtype == dtype and copy.is_current(weight):
        return copy.tensor
    return weight.to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` in the type of x, whatever autocast says: [R, I] -> [R, O]."""
    with torch.autocast(x.device.type, enabled=False):
        if _in_weight_type(x, weight):
            return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
        return F.linear(x, _cast(weight, x.dtype), None if bias is None else bias.to(x.dtype))


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """`gradient @ weight` in the type of the gradient: [R, O] -> [R, I]."""
    with torch.autocast(gradient.device.type, enabled=False):
        if _in_weight_type(gradient, weight):
            return torch.mm(gradient.to(weight.dtype), weight).to(gradient.dtype)
        return torch.mm(gradient, _cast(weight, gradient.dtype))


def weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`gradient.T @ x` in the type of the weight: [R, O], [R, I] -> [O, I]."""
    with torch.autocast(x.device.type, enabled=False):
        if _in_weight_type(x, weight):
            return torch.mm(gradient.to(weight.dtype).t(), x.to(weight.dtype))
        return torch.mm(gradient.t(), x).to(weight.dtype)


def _in_weight_type(x: Tensor, weight: Tensor) -> bool:
    """Whether to convert the activations to the weight's type rather than the weight to theirs."""
    return x.dtype == weight.dtype or (x.device.type == "cpu" and not has_fast_bfloat16())
