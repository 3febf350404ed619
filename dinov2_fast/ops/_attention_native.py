"""Calls of the extension's attention kernels on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast import environment, native


def refusals(**tensors: Tensor) -> dict[str, str]:
    """Why the layout of some [T, H, D] tensor rules out the native backend."""
    for name, tensor in tensors.items():
        if tensor.stride(2) != 1 and tensor.numel() > 0:
            why = f"{name} must have adjacent channels (stride 1), got stride {tensor.stride(2)}"
            return {"native": why}
    return {}


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [Tq, H, D] and lse [H, Tq] float32; offsets are [S + 1] int32."""
    num_queries, heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    scratch, options = _scratch(q_offsets, k_offsets, head_dim, backward=False)
    lse = torch.empty(heads, num_queries, dtype=torch.float32)
    native.module().attention_forward_cpu(
        q=_view(q),
        k=_view(k),
        v=_view(v),
        out=_view(out),
        lse=lse.data_ptr(),
        query_offsets=q_offsets.data_ptr(),
        key_offsets=k_offsets.data_ptr(),
        sequences=q_offsets.shape[0] - 1,
        num_queries=num_queries,
        heads=heads,
        head_dim=head_dim,
        scale=scale,
        dtype=str(q.dtype).removeprefix("torch."),
        level=environment.cpu_level(),
        **options,
    )
    del scratch  # lives until here
    return out, lse


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    scale: float,
    *,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
) -> None:
    """Write the gradients of queries, keys and values."""
    num_queries, heads, head_dim = q.shape
    scratch, options = _scratch(q_offsets, k_offsets, head_dim, backward=True)
    native.module().attention_backward_cpu(
        d_out=_view(d_out),
        q=_view(q),
        k=_view(k),
        v=_view(v),
        d_q=_view(d_q),
        d_k=_view(d_k),
        d_v=_view(d_v),
        lse=lse.data_ptr(),
        query_offsets=q_offsets.data_ptr(),
        key_offsets=k_offsets.data_ptr(),
        sequences=q_offsets.shape[0] - 1,
        num_queries=num_queries,
        heads=heads,
        head_dim=head_dim,
        scale=scale,
        dtype=str(q.dtype).removeprefix("torch."),
        level=environment.cpu_level(),
        **options,
    )
    del scratch  # lives until here


def _view(tensor: Tensor) -> tuple[int, int, int]:
    """Pointer, row stride and head stride of [T, H, D]."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def _scratch(
    q_offsets: Tensor, k_offsets: Tensor, head_dim: int, *, backward: bool
) -> tuple[Tensor, dict[str, int]]:
    """Memory for every thread, and the arguments that describe it."""
    sequences, threads = q_offsets.shape[0] - 1, torch.get_num_threads()
    longest = [int(o.diff().max()) if sequences else 0 for o in (q_offsets, k_offsets)]
    floats = native.module().attention_scratch_floats_cpu(
        max_queries=longest[0], max_keys=longest[1], head_dim=head_dim, backward=backward
    )
    scratch = torch.empty(threads * floats, dtype=torch.float32)
    return scratch, {
        "scratch": scratch.data_ptr(),
        "floats_per_thread": floats,
        "threads": threads,
    }
