"""Calls of the extension's attention kernels on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinov2_fast import environment, native
from dinov2_fast.ops._native_cpu import dtype_name


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    launches: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [Tq, H, D] and lse [H, Tq] float32; offsets are [S + 1] int32, launches unused."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    _run("attention_forward_cpu", (q, k, v, out), lse, q_offsets, k_offsets, scale)
    return out, lse


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    launches: list[int],
    scale: float,
    *,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
) -> None:
    """Write the gradients of queries, keys and values; out, lse and launches are unused."""
    tensors = (q, k, v, d_out, d_q, d_k, d_v)
    _run("attention_backward_cpu", tensors, None, q_offsets, k_offsets, scale)


def _run(name: str, *common: Any) -> None:
    """Call the extension, with memory for every thread where that of its stack does not suffice."""
    run, arguments = getattr(native.module(), name), _arguments(*common)
    floats = run(*arguments)
    if floats:
        num_floats = torch.get_num_threads() * floats
        scratch = torch.empty(num_floats, dtype=torch.float32, device="cpu")
        run(*arguments, scratch.data_ptr(), floats)


def _arguments(
    tensors: tuple[Tensor, ...],
    lse: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    scale: float,
) -> tuple[Any, ...]:
    """What the extension takes, in its order, up to scratch; q is the first of the tensors."""
    views: list[tuple[int, int, int]] = []
    for tensor in tensors:
        row_stride, head_stride, _ = tensor.stride()
        views.append((tensor.data_ptr(), row_stride, head_stride))
    return (
        tuple(views),
        0 if lse is None else lse.data_ptr(),
        q_offsets.data_ptr(),
        k_offsets.data_ptr(),
        q_offsets.shape[0] - 1,
        *tensors[0].shape,
        scale,
        dtype_name(tensors[0]),
        torch.get_num_threads(),
        environment.cpu_level(),
    )
