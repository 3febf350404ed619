"""SwiGLU: the gated activation between the two matrix products of a feed-forward layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast import environment, native
from dinov2_fast.backends import choose_backend
from dinov2_fast.ops._checks import check_tensor
from dinov2_fast.ops._declare import declare


def swiglu_reference(x12: Tensor) -> Tensor:
    """`swiglu` in plain PyTorch: the specification."""
    x1, x2 = x12.chunk(2, dim=-1)
    return F.silu(x1) * x2  # [R, F]


def swiglu(x12: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(x1) * x2 of the two halves of each row; the first half is the gate.

    Args:
        x12: [R, 2F], any float dtype; rows may be strided.
        backend: one of `dinov2_fast.backends.BACKENDS`; None chooses.
    Returns:
        [R, F], the dtype of x12. Kernels compute in float32 and round once at the end.
    Raises:
        ValueError: x12 is not a matrix of an even width.
        TypeError: x12 does not hold floats.
        BackendUnavailable: the explicit backend cannot compute this.
    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    _check(x12)
    refusals = {}
    if x12.stride(1) != 1 and x12.numel() > 0:
        why = f"x12 must have adjacent columns (stride 1), got stride {x12.stride(1)}"
        refusals = {"native": why}
    chosen = choose_backend("swiglu", x12, backend, refusals=refusals)
    if chosen == "reference":
        return swiglu_reference(x12)
    return _forward(x12, chosen)


def _check(x12: Tensor) -> None:
    """Refuse what is no [R, 2F] of floats."""
    check_tensor("swiglu", "x12", x12, "R", "2F")
    if x12.shape[1] % 2 != 0:
        raise ValueError(f"swiglu: x12 must have an even width 2F, got {x12.shape[1]}")


def _forward_native_cpu(x12: Tensor) -> Tensor:
    """Native forward on the CPU."""
    rows, hidden = x12.shape[0], x12.shape[1] // 2
    h = x12.new_empty(rows, hidden)
    native.module().swiglu_forward_cpu(
        x12=x12.data_ptr(),
        h=h.data_ptr(),
        rows=rows,
        hidden=hidden,
        x12_row_stride=x12.stride(0),
        h_row_stride=h.stride(0),
        dtype=_dtype_name(x12),
        threads=torch.get_num_threads(),
        level=environment.cpu_level(),
    )
    return h


def _forward_native_cuda(x12: Tensor) -> Tensor:
    """Native forward on the current stream of x12's GPU."""
    rows, hidden = x12.shape[0], x12.shape[1] // 2
    h = x12.new_empty(rows, hidden)
    native.module().swiglu_forward_cuda(
        x12=x12.data_ptr(),
        h=h.data_ptr(),
        rows=rows,
        hidden=hidden,
        x12_row_stride=x12.stride(0),
        h_row_stride=h.stride(0),
        dtype=_dtype_name(x12),
        device=h.get_device(),
        stream=torch.cuda.current_stream(x12.device).cuda_stream,
    )
    return h


def _backward_native_cpu(dh: Tensor, x12: Tensor) -> Tensor:
    """Native backward on the CPU."""
    dh, dx12 = _adjacent_columns(dh), _empty_gradient(x12)
    native.module().swiglu_backward_cpu(
        dh=dh.data_ptr(),
        x12=x12.data_ptr(),
        dx12=dx12.data_ptr(),
        rows=x12.shape[0],
        hidden=x12.shape[1] // 2,
        dh_row_stride=dh.stride(0),
        x12_row_stride=x12.stride(0),
        dx12_row_stride=dx12.stride(0),
        dtype=_dtype_name(x12),
        threads=torch.get_num_threads(),
        level=environment.cpu_level(),
    )
    return dx12


def _backward_native_cuda(dh: Tensor, x12: Tensor) -> Tensor:
    """Native backward on the current stream of x12's GPU."""
    dh, dx12 = _adjacent_columns(dh), _empty_gradient(x12)
    native.module().swiglu_backward_cuda(
        dh=dh.data_ptr(),
        x12=x12.data_ptr(),
        dx12=dx12.data_ptr(),
        rows=x12.shape[0],
        hidden=x12.shape[1] // 2,
        dh_row_stride=dh.stride(0),
        x12_row_stride=x12.stride(0),
        dx12_row_stride=dx12.stride(0),
        dtype=_dtype_name(x12),
        device=dx12.get_device(),
        stream=torch.cuda.current_stream(x12.device).cuda_stream,
    )
    return dx12


def _adjacent_columns(dh: Tensor) -> Tensor:
    """The incoming gradient, copied when autograd expanded it; no caller chose that layout."""
    return dh if dh.stride(1) == 1 else dh.contiguous()


def _empty_gradient(x12: Tensor) -> Tensor:
    """Contiguous storage for the gradient of x12, whatever the strides of x12."""
    return x12.new_empty(x12.shape)


def _dtype_name(tensor: Tensor) -> str:
    """The dtype as the extension spells it."""
    return str(tensor.dtype).removeprefix("torch.")


def _forward_fake(x12: Tensor) -> Tensor:
    return x12.new_empty(x12.shape[0], x12.shape[1] // 2)


def _backward_fake(dh: Tensor, x12: Tensor) -> Tensor:
    return _empty_gradient(x12)


def _setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    """Keep x12 alone: recomputing h costs less than reading it back."""
    x12, ctx.backend = inputs
    ctx.save_for_backward(x12)


def _gradient(ctx: Any, dh: Tensor) -> tuple[Tensor, None]:
    """Gradients of (x12, backend)."""
    (x12,) = ctx.saved_tensors
    return _backward(dh, x12, ctx.backend), None


_backward = declare(
    "swiglu_backward(Tensor dh, Tensor x12, str backend) -> Tensor",
    kernels={
        ("native", "cpu"): _backward_native_cpu,
        ("native", "cuda"): _backward_native_cuda,
    },
    fake=_backward_fake,
)
_forward = declare(
    "swiglu(Tensor x12, str backend) -> Tensor",
    kernels={
        ("native", "cpu"): _forward_native_cpu,
        ("native", "cuda"): _forward_native_cuda,
    },
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)
