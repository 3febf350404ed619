"""The kernels behind the reference of attention: which there are and how they are launched."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.ops import _attention_cuda as cuda_kernels
from dinov2_fast.ops import _attention_native as native_kernels
from dinov2_fast.ops import _attention_triton as triton_kernels
from dinov2_fast.ops._native_cpu import on_cuda
from dinov2_fast.ops._native_cpu import refusals as native_refusals
from dinov2_fast.packing import Pack

MAX_LAUNCHES = 4
# (backend, device type) -> forward and backward; interpreted, Triton's take tensors of the CPU.
KERNELS: dict[tuple[str, str], Any] = {
    ("native", "cpu"): native_kernels,
    ("native", "cuda"): cuda_kernels,
    ("triton", "cpu"): triton_kernels,
    ("triton", "cuda"): triton_kernels,
}


def refusals(**tensors: Tensor) -> dict[str, str]:
    """Why the types, head dimension or layouts of [T, H, D] tensors rule out backends."""
    q = next(iter(tensors.values()))
    of_cuda = cuda_kernels.refusals(**tensors) if on_cuda(q) else {}
    return triton_kernels.refusals(**tensors) | of_cuda | native_refusals(tensors, {})


def kernels_of(q: Tensor, backend: str) -> Any:
    """The kernels of a backend that compute on the device of q."""
    return KERNELS[backend, "cuda" if backend == "native" and on_cuda(q) else q.device.type]


def are_of_a_gpu(q: Tensor, backend: str) -> bool:
    """Whether the kernels are launched by runs of sequences and read the output in the backward."""
    return backend == "triton" or on_cuda(q)


def launches(
    q: Tensor, queries: Pack, keys: Pack, backend: str, deterministic: bool | None = None
) -> list[int]:
    """What the kernels of a GPU are launched for, in numbers that a schema can hold.

    A few groups of equally long sequences take one launch each, without idle blocks; many take one
    launch together.

    Args:
        q: the queries; their device decides with the backend which kernels they are.
        queries: layout of the queries.
        keys: layout of the keys, with as many sequences.
        backend: the chosen one.
        deterministic: whether the backward gives the same bits in every run; None asks
            `torch.use_deterministic_algorithms`.
    Returns:
        Five numbers a launch: its first sequence, how many there are, the tokens of the longest
        sequence of queries and of keys, and whether the backward may sum in any order. Empty for
        kernels of the CPU.
    """
    if not are_of_a_gpu(q, backend):
        return []
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    in_any_order = int(not deterministic)
    counts = [count for count, _ in keys.groups]
    if counts != [count for count, _ in queries.groups] or len(counts) > MAX_LAUNCHES:
        groups = queries.groups, keys.groups
        longest = (max((n for c, n in g if c), default=0) for g in groups)
        return [0, sum(counts), *longest, in_any_order]
    firsts = itertools.accumulate(counts, initial=0)
    runs = zip(firsts, counts, queries.groups, keys.groups, strict=False)
    numbers = ((first, count, q[1], k[1], in_any_order) for first, count, q, k in runs)
    return list(itertools.chain.from_iterable(numbers))
