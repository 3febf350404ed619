"""Calls of the extension's attention kernels on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast import environment, native
from dinov2_fast.ops._native_cpu import Argument, dtype_name, run_cpu


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
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    common = _arguments(q, k, v, q_offsets, k_offsets, scale, backward=False)
    run_cpu("attention_forward_cpu", **common, out=_view(out), lse=lse)
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
    common = _arguments(q, k, v, q_offsets, k_offsets, scale, backward=True)
    gradients = {"d_out": d_out, "d_q": d_q, "d_k": d_k, "d_v": d_v}
    views = {name: _view(tensor) for name, tensor in gradients.items()}
    run_cpu("attention_backward_cpu", **common, **views)


def _view(tensor: Tensor) -> tuple[int, int, int]:
    """Pointer, row stride and head stride of [T, H, D]."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    scale: float,
    *,
    backward: bool,
) -> dict[str, Argument]:
    """What both kernels take, with memory for every thread."""
    sequences, threads = q_offsets.shape[0] - 1, torch.get_num_threads()
    num_queries, heads, head_dim = q.shape
    floats = native.module().attention_scratch_floats_cpu(
        query_offsets=q_offsets.data_ptr(),
        key_offsets=k_offsets.data_ptr(),
        sequences=sequences,
        head_dim=head_dim,
        backward=backward,
        dtype=dtype_name(q),
        level=environment.cpu_level(),
    )
    return {
        "q": _view(q),
        "k": _view(k),
        "v": _view(v),
        "query_offsets": q_offsets,
        "key_offsets": k_offsets,
        "scratch": q.new_empty(threads * floats, dtype=torch.float32),
        "floats_per_thread": floats,
        "sequences": sequences,
        "num_queries": num_queries,
        "heads": heads,
        "head_dim": head_dim,
        "scale": scale,
        "dtype": dtype_name(q),
        "threads": threads,
    }
