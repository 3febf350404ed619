"""The kernels behind the reference of attention: which there are and how they are launched."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from dinov2_fast import flash_attention, native
from dinov2_fast.backends import choose_backend, native_is_chosen_on_cpu
from dinov2_fast.ops import _attention_cuda as cuda_kernels
from dinov2_fast.ops import _attention_flash_attn as flash_attn_kernels
from dinov2_fast.ops import _attention_native as native_kernels
from dinov2_fast.ops import _attention_triton as triton_kernels
from dinov2_fast.ops._checks import check_pack
from dinov2_fast.ops._native_cpu import FLOATS, on_cuda
from dinov2_fast.ops._native_cpu import refusals as native_refusals
from dinov2_fast.packing import Pack

MAX_LAUNCHES = 4
# Longest sequence up to which a kernel that has it whole is ahead of FlashAttention-3 (modelled:
# docs/cuda-kernels.md).
SHORT = 300
# (backend, device type) -> forward and backward; interpreted, Triton's take tensors of the CPU.
KERNELS: dict[tuple[str, str], Any] = {
    ("native", "cpu"): native_kernels,
    ("native", "cuda"): cuda_kernels,
    ("triton", "cpu"): triton_kernels,
    ("triton", "cuda"): triton_kernels,
    ("flash_attn", "cuda"): flash_attn_kernels,
}
_NO_TENSORS: dict[str, Tensor] = {}


def is_usual(
    q: Tensor, k: Tensor, v: Tensor, pack: Pack, scale: float | None, backend: str | None
) -> bool:
    """Whether a call passes every check, and automatic choice takes native kernels of the CPU.

    In one look, for calls of a few tokens: checks and choice take longer than their kernel.
    """
    if backend is not None or torch.compiler.is_compiling() or type(pack) is not Pack:
        return False
    if not type(q) is type(k) is type(v) is Tensor:
        return False
    shape, dtype = q.shape, q.dtype
    return (
        q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and pack.offsets.is_cpu
        and dtype in FLOATS
        and k.dtype == dtype
        and v.dtype == dtype
        and len(shape) == 3
        and k.shape == shape
        and v.shape == shape
        and shape[0] == pack.num_tokens
        and shape[2] > 0
        and q.stride()[2] == 1
        and k.stride()[2] == 1
        and v.stride()[2] == 1
        and (scale is None or math.isfinite(scale))
        and native_is_chosen_on_cpu("attention")
    )


def choose(
    backend: str | None, queries: Pack, keys: Pack, *, scale: float, **tensors: Tensor
) -> str:
    """The backend of a call.

    Args:
        backend: explicit choice, or None.
        queries: layout of the queries.
        keys: layout of the keys.
        scale: factor on the scores.
        tensors: [T, H, D], q among them.
    """
    q, first = tensors["q"], None
    if on_cuda(q) and max(queries.max_length, keys.max_length) > SHORT and _has_flash_attn_3():
        first = "flash_attn"
    refused = functools.partial(why_not, scale=scale, tensors=tensors)
    return choose_backend("attention", q, backend, refusals=refused, first=first)


def why_not(backend: str, *, scale: float, tensors: dict[str, Tensor]) -> str:
    """Why the scale, or types, head dimension or layouts of [T, H, D] tensors rule a backend out.

    Args:
        backend: of which `choose_backend` asks.
        scale: factor on the scores.
        tensors: by name, q among them.
    Returns:
        The reason, or "".
    """
    if backend == "triton":
        refused = triton_kernels.refusals(**tensors)
    elif backend == "native":
        refused = native_refusals(tensors, _NO_TENSORS)
        if not refused and on_cuda(tensors["q"]):
            refused = cuda_kernels.refusals(**tensors)
    elif backend == "flash_attn" and on_cuda(tensors["q"]):
        refused = flash_attn_kernels.refusals(scale, **tensors)
    else:
        return ""
    return refused[backend] if refused else ""


def _has_flash_attn_3() -> bool:
    """Whether FlashAttention-3 is installed and runs on the current GPU."""
    return not flash_attention.why_not() and flash_attention.installed().generation == 3


# A constant of torch.compile, as in `backends`.
_has_flash_attn_3._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def kernels_of(q: Tensor, backend: str) -> Any:
    """The kernels of a backend that compute on the device of q."""
    return KERNELS[backend, native.place_of(backend, q.device.type)]


def query_pack(op: str, q: Tensor, k: Tensor, pack: Pack, q_pack: Pack | None) -> Pack:
    """The layout of the queries, checked against that of the keys.

    Raises:
        ValueError: a layout of other tokens, or of another number of sequences.
    """
    queries = pack if q_pack is None else q_pack
    check_pack(op, pack, k)
    check_pack(op, queries, q)
    if queries.num_sequences != pack.num_sequences:
        raise ValueError(
            f"{op}: q_pack must have the {pack.num_sequences} sequences of pack, "
            f"got {queries.num_sequences}"
        )
    return queries


def are_of_a_gpu(q: Tensor, backend: str) -> bool:
    """Whether kernels are launched by runs of sequences, and read out and lse in the backward."""
    return backend == "triton" or on_cuda(q)


def backward_reads_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pack: Pack,
    *,
    scale: float,
    q_pack: Pack | None = None,
    backend: str | None = None,
) -> bool:
    """Whether `attention_backward` will read lse; on a CPU it has the scores of all keys at once.

    Args:
        q: [Tq, H, D] queries, as for `attention_forward`.
        k: [T, H, D] keys.
        v: [T, H, D] values.
        pack: layout of the keys.
        scale: factor on the scores.
        q_pack: layout of the queries; None is `pack`.
        backend: see `backends.choose_backend`.
    Raises:
        BackendUnavailable: the explicit backend cannot compute this call.
    """
    queries = pack if q_pack is None else q_pack
    return are_of_a_gpu(q, choose(backend, queries, pack, scale=scale, q=q, k=k, v=v))


def launches(
    q: Tensor, queries: Pack, keys: Pack, backend: str, deterministic: bool | None = None
) -> list[int]:
    """What the kernels of a GPU are launched for, in numbers that a schema can hold.

    A few groups of equally long sequences take one launch each, without idle blocks; many take one
    launch together, and so does everything that flash-attn computes.

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
    together = backend == "flash_attn" or len(counts) > MAX_LAUNCHES
    if together or counts != [count for count, _ in queries.groups]:
        groups = queries.groups, keys.groups
        longest = (max((n for c, n in g if c), default=0) for g in groups)
        return [0, sum(counts), *longest, in_any_order]
    firsts = itertools.accumulate(counts, initial=0)
    runs = zip(firsts, counts, queries.groups, keys.groups, strict=False)
    numbers = ((first, count, q[1], k[1], in_any_order) for first, count, q, k in runs)
    return list(itertools.chain.from_iterable(numbers))
