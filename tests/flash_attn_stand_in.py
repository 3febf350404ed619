"""Stand-ins for releases of flash-attn that compute on the CPU and refuse what those refuse.

Names, order and defaults of parameters, what is returned and what is checked are facts of
FlashAttention-2 (2.6 to 2.8) and -3; the arithmetic is plain PyTorch in float32.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dinov2_fast import backends, flash_attention, native

Values = dict[str, Any]
Function = Callable[..., Any]

_PACK = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float dropout_p, float softmax_scale, bool causal, "
)
_FORWARD_2 = (
    f"{_PACK}SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0.0, "
    "Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? block_table=None, "
    "Tensor? leftpad_k=None, Tensor? seqused_k=None"
)
_FOUR = "-> (Tensor, Tensor, Tensor, Tensor)"
_BACKWARD_2 = (
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    f"Tensor(a6!)? dq, Tensor(a7!)? dk, Tensor(a8!)? dv, {_PACK}SymInt window_size_left, "
    "SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool deterministic, "
    "Tensor? rng_state=None"
)
_FORWARD_3_FIRST = (
    "Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? qv, Tensor? out, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, "
    "Tensor? seqused_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, Tensor? page_table, "
    "Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, Tensor? rotary_sin, "
    "Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, "
    "float? softmax_scale, bool causal, int[2] window_size=[-1, -1], int attention_chunk=0, "
    "float softcap=0.0, bool rotary_interleaved=True, Tensor? scheduler_metadata=None, "
    "int num_splits=1, bool? pack_gqa=None, int sm_margin=0"
)
_BACKWARD_3_FIRST = (
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? sequed_q, Tensor? sequed_k, "
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k, Tensor? dq, Tensor? dk, Tensor? dv, "
    "float? softmax_scale, bool causal, int[2] window_size=[-1, -1], float softcap=0.0, "
    "bool deterministic=False, int sm_margin=0"
)
_FORWARD_3 = (
    "Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? qv=None, "
    "Tensor? out_=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, Tensor? page_table=None, "
    "Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, "
    "Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, "
    "bool causal=False, SymInt window_size_left=-1, SymInt window_size_right=-1, "
    "SymInt attention_chunk=0, float softcap=0.0, bool rotary_interleaved=True, "
    "Tensor? scheduler_metadata=None, SymInt num_splits=1, bool? pack_gqa=None, "
    "SymInt sm_margin=0"
)
_BACKWARD_3 = (
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? sequed_q=None, "
    "Tensor? sequed_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, "
    "Tensor(a12!)? dq=None, Tensor(a13!)? dk=None, Tensor(a14!)? dv=None, "
    "float? softmax_scale=None, bool is_causal=False, SymInt window_size_left=-1, "
    "SymInt window_size_right=-1, float softcap=0.0, bool deterministic=False, SymInt sm_margin=0"
)
_WRITTEN = "Tensor(a0!) q, Tensor(a1!) k, Tensor(a2!) v, "
_READ = "Tensor q, Tensor k, Tensor v, "
_OLD = _FORWARD_2.replace(
    "SymInt window_size_left=-1, SymInt window_size_right=-1", "int[2] window_size=[-1, -1]"
)

# Release -> schemas of forward and backward, and whether they are ops of torch.library.
RELEASES: dict[str, tuple[str, str, bool]] = {
    "2.6.3": (f"({_READ}{_OLD}) {_FOUR}", f"({_BACKWARD_2}) -> Tensor", False),
    # It declares that the forward writes to its inputs.
    "2.7.0": (f"({_WRITTEN}{_FORWARD_2}) {_FOUR}", f"({_BACKWARD_2}) -> Tensor", True),
    "2.8.3": (
        f"({_READ}{_FORWARD_2}, bool zero_tensors=False) {_FOUR}",
        f"({_BACKWARD_2}, bool zero_tensors=False) -> Tensor",
        True,
    ),
    "3.0.0b1": (f"({_FORWARD_3_FIRST}) {_FOUR}", f"({_BACKWARD_3_FIRST}) -> Tensor", False),
    "3.0.0": (f"({_FORWARD_3}) {_FOUR}", f"({_BACKWARD_3}) -> Tensor", True),
}
SERVED = [name for name in RELEASES if name != "2.6.3"]

# Arguments of every call of a stand-in since `flash_attn_on_cpu`.
CALLS: list[Values] = []


@contextlib.contextmanager
def flash_attn_on_cpu(*releases: str, capability: int | None = 9) -> Iterator[list[Values]]:
    """These releases of flash-attn are installed and no other, and compute on tensors of the CPU.

    Args:
        releases: of `RELEASES`, at most one of FlashAttention-2 and one of -3.
        capability: major number of the GPU's compute capability; None is no GPU.
    Yields:
        The arguments of every call so far.
    """
    modules: dict[str, types.ModuleType | None] = {
        _root(generation): None for generation in flash_attention.GENERATIONS
    }
    versions: dict[str, str] = {}
    for release in releases:
        generation = next(g for g in flash_attention.GENERATIONS if g.number == int(release[0]))
        versions[generation.distribution] = release
        module = types.ModuleType(generation.module)
        module.__spec__ = importlib.machinery.ModuleSpec(generation.module, None)
        modules |= {generation.module: module, _root(generation): module}
        for name, function in zip(generation.functions, FUNCTIONS[release], strict=True):
            setattr(module, name, function)
    CALLS.clear()
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)  # mock.patch.dict would forget what is imported meanwhile
    with (
        mock.patch.object(metadata, "version", versions.__getitem__),
        mock.patch.object(flash_attention, "_capability", return_value=capability),
        mock.patch.object(native, "cuda_on_cpu", True),
    ):
        _forget()
        try:
            yield CALLS
        finally:
            for name in modules:
                del sys.modules[name]
            sys.modules.update(before)
            _forget()


def _root(generation: flash_attention.Generation) -> str:
    return generation.module.partition(".")[0]


def _forget() -> None:
    """What is known of this machine."""
    flash_attention._load.cache_clear()
    backends._why_not.cache_clear()


def _forward(a: Values) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = a["q"], a["k"], a["v"]
    _check(a, "q", "k", "v")
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0])
    for rows, keys in _sequences(a):
        scores = _products(q[rows], k[keys]) * a["softmax_scale"]
        lse[:, rows] = scores.logsumexp(-1) if scores.shape[2] else torch.inf
        weights = scores.softmax(-1)
        out[rows] = torch.einsum("hnm,mhd->nhd", weights, v[keys].float()).to(q.dtype)
    return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)


def _backward(a: Values) -> Tensor:
    q, k, v, d_out, out, lse = (a[n] for n in ("q", "k", "v", "dout", "out", "softmax_lse"))
    _check(a, "q", "k", "v", "dout", "out", "dq", "dk", "dv")
    if lse.shape != (q.shape[1], q.shape[0]) or lse.dtype != torch.float32:
        raise RuntimeError(f"softmax_lse: got {lse.dtype} {tuple(lse.shape)}")
    delta = (d_out.float() * out.float()).sum(-1).t()  # [H, Tq]
    for rows, keys in _sequences(a):
        scale, d_out_i = a["softmax_scale"], d_out[rows].float()
        scores = _products(q[rows], k[keys]) * scale
        weights = (scores - lse[:, rows].unsqueeze(-1)).exp()
        d_weights = _products(d_out[rows], v[keys])
        d_scores = weights * (d_weights - delta[:, rows].unsqueeze(-1)) * scale
        a["dv"][keys] = torch.einsum("hnm,nhd->mhd", weights, d_out_i).to(q.dtype)
        a["dq"][rows] = torch.einsum("hnm,mhd->nhd", d_scores, k[keys].float()).to(q.dtype)
        a["dk"][keys] = torch.einsum("hnm,nhd->mhd", d_scores, q[rows].float()).to(q.dtype)
    return delta.clone()


def _products(x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("nhd,mhd->hnm", x.float(), y.float())


def _sequences(a: Values) -> list[tuple[slice, slice]]:
    queries, keys = (a[f"cu_seqlens_{x}"].tolist() for x in "qk")
    pairs = zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True)
    return [(slice(*rows), slice(*columns)) for rows, columns in pairs]


def _check(a: Values, *names: str) -> None:
    """What the packages refuse, and what their kernels would do wrong without a word."""
    q = a["q"]
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if q.shape[2] % 8 or q.shape[2] > 256:
        raise RuntimeError("head_size should be a multiple of 8, at most 256")
    for name in names:
        x = a[name]
        if x.dtype != q.dtype:
            raise RuntimeError(f"query and {name} must have the same dtype")
        if x.stride(-1) != 1:
            raise RuntimeError(f"{name} must have contiguous last dimension")
        misplaced = x.data_ptr() % 16 or any(s % 8 for s in x.stride()[:2])
        if misplaced and x.shape[0] > 1:
            raise RuntimeError(f"{name}: CUDA error: misaligned address")
    for x in "qk":
        offsets, longest = a[f"cu_seqlens_{x}"], a[f"max_seqlen_{x}"]
        if offsets.dtype != torch.int32 or not offsets.is_contiguous():
            raise RuntimeError(f"cu_seqlens_{x} must have dtype int32 and be contiguous")
        if offsets.numel() < 2 or q.shape[1] == 0:
            raise RuntimeError("batch size must be positive")
        if int(offsets[-1]) != a[x].shape[0] or longest != int(offsets.diff().max()):
            raise RuntimeError(f"rows of {x} that the grid does not reach, or that do not exist")
    if not a["softmax_scale"] > 0:
        raise RuntimeError("the maximum of the scores is that of the products")
    asked = {"dropout_p": 0.0, "softcap": 0.0, "causal": False, "is_causal": False}
    asked |= {"window_size_left": -1, "window_size_right": -1, "num_splits": 1}
    asked |= {"attention_chunk": 0, "sm_margin": 0, "zero_tensors": False}
    for name, value in asked.items():
        if a.get(name, value) != value:
            raise NotImplementedError(f"{name}={a[name]}")
    if tuple(a.get("window_size", (-1, -1))) != (-1, -1):
        raise NotImplementedError("window_size")
    for name in ("k_new", "v_new", "qv", "alibi_slopes", "page_table", "block_table", "seqused_k"):
        if a.get(name) is not None:
            raise NotImplementedError(name)


def _bound(name: str, schema: str, run: Callable[[Values], Any]) -> tuple[Function, Function]:
    """A function with the parameters of a schema, and one that takes whatever torch passes."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    arguments = torch._C.parse_schema(f"{name}{schema}").arguments
    defaults = [
        a.default_value if a.has_default_value() else inspect.Parameter.empty for a in arguments
    ]
    signature = inspect.Signature(
        inspect.Parameter(a.name, kind, default=default)
        for a, default in zip(arguments, defaults, strict=True)
    )

    def call(*given: Any, **named: Any) -> Any:
        values = signature.bind(*given, **named)
        values.apply_defaults()
        CALLS.append(dict(values.arguments))
        return run(values.arguments)

    def function(*given: Any, **named: Any) -> Any:
        return call(*given, **named)

    function.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return function, call


def _functions(release: str) -> tuple[Function, ...]:
    """Forward and backward of a release."""
    *schemas, ops = RELEASES[release]
    made: list[Function] = []
    for name, schema, run in zip(
        ("forward", "backward"), schemas, (_forward, _backward), strict=True
    ):
        function, call = _bound(name, schema, run)
        if ops:
            qualified = f"flash_attn_stand_in_{release.replace('.', '_')}::{name}"
            written = [
                a.name for a in torch._C.parse_schema(f"f{schema}").arguments if a.alias_info
            ]
            function = torch.library.custom_op(
                qualified, call, mutates_args=written, device_types="cpu", schema=schema
            )
        made.append(function)
    return tuple(made)


FUNCTIONS = {release: _functions(release) for release in RELEASES}
