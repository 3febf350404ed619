"""What a call of a memory-bound op does around its kernel, in numbers of calls rather than seconds.

At a few MB an op takes about a millisecond, and after other work neither the interpreter's code nor
its objects are in the caches: every function called on the way costs microseconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

from dinov2_fast import native
from dinov2_fast.backends import use_backend
from dinov2_fast.ops import _triton
from dinov2_fast.ops._attention_kernels import is_usual
from dinov2_fast.ops.attention import attention, attention_backward, attention_forward
from dinov2_fast.ops.gelu import gelu, gelu_backward_
from dinov2_fast.ops.koleo import koleo
from dinov2_fast.ops.layer_norm import layer_norm_backward_, layer_norm_forward
from dinov2_fast.ops.stochastic_depth import gather_rows, gather_scaled, scatter_add_scaled_
from dinov2_fast.ops.swiglu import swiglu, swiglu_backward_
from dinov2_fast.packing import Pack


@pytest.fixture(autouse=True)
def native_kernels_by_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BACKEND", "PREFER", "DISABLE_KERNELS"):
        monkeypatch.delenv(f"DINOV2_FAST_{name}", raising=False)
    if native.why_not():
        pytest.skip(f"native: {native.why_not()}")


def functions_called(work: Callable[[], object]) -> int:
    """Python functions that a call enters, itself not counted."""
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    work()  # imports and what is found out once
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count - 1


def calls() -> dict[str, Callable[[], object]]:
    """Name -> a call on one row of eight channels: whatever is not the kernel."""
    x, rows, scale = torch.randn(4, 8), torch.tensor([2]), torch.ones(1)
    weight, bias = torch.ones(8), torch.zeros(8)
    y, rstd = layer_norm_forward(x, weight, bias, eps=1e-6, rows=rows)
    pack, (q, k, v) = Pack.from_groups([(1, 4)]), torch.randn(3, 4, 1, 8).unbind(0)
    out, lse = attention_forward(q, k, v, pack, scale=1.0)
    with_gradient = q.clone().requires_grad_()
    graph = attention(with_gradient, k, v, pack)
    gradients = {f"d_{name}": torch.empty_like(q) for name in ("q", "k", "v")}
    return {
        "attention": lambda: attention(q, k, v, pack),
        "attention, to be differentiated": lambda: attention(with_gradient, k, v, pack),
        "attention, its gradient": lambda: graph.backward(out, retain_graph=True),
        "attention_forward": lambda: attention_forward(q, k, v, pack, scale=1.0),
        "attention_backward": lambda: attention_backward(
            out, q, k, v, lse, pack, scale=1.0, **gradients
        ),
        "koleo": lambda: koleo(x),
        "layer_norm_forward": lambda: layer_norm_forward(x, weight, bias, eps=1e-6, rows=rows),
        "layer_norm_backward_": lambda: layer_norm_backward_(
            x, y, y, rstd, weight, bias, rows=rows
        ),
        "scatter_add_scaled_": lambda: scatter_add_scaled_(x, y, rows, scale, weight),
        "gather_scaled": lambda: gather_scaled(x, rows, scale),
        "gather_rows": lambda: gather_rows(x, rows),
        "gelu": lambda: gelu(x),
        "gelu_backward_": lambda: gelu_backward_(x.clone(), x.clone()),
        "swiglu": lambda: swiglu(x),
        "swiglu_backward_": lambda: swiglu_backward_(x[:, :4].clone(), x.clone()),
    }


# Two above what each takes, so that another version of torch may add a wrapper. When every call
# went by torch's dispatcher and attention looked at each thing for itself, attention took 65, 73,
# 56, 78 and 82.
MOST_FUNCTIONS = {
    "attention": 24,
    "attention, to be differentiated": 31,
    "attention, its gradient": 44,
    "attention_forward": 49,
    "attention_backward": 49,
    "koleo": 38,
    "layer_norm_forward": 43,
    "layer_norm_backward_": 45,
    "scatter_add_scaled_": 39,
    "gather_scaled": 36,
    "gather_rows": 36,
    "gelu": 32,
    "gelu_backward_": 34,
    "swiglu": 33,
    "swiglu_backward_": 35,
}


@pytest.mark.parametrize("name", MOST_FUNCTIONS)
def test_a_call_enters_few_functions_besides_its_kernel(name: str):
    assert functions_called(calls()[name]) <= MOST_FUNCTIONS[name]


@pytest.mark.parametrize("name", MOST_FUNCTIONS)
def test_only_the_backend_that_computes_is_asked_for_its_reasons(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    asked: list[object] = []
    work = calls()[name]
    monkeypatch.setattr(_triton, "triton_refusals", lambda *tensors: asked.append(tensors) or {})
    work()
    assert not asked


X = torch.randn(4, 1, 8)
# One thing each that sends attention by its checks and the choice of its backend.
UNUSUAL: dict[str, dict[str, Any]] = {
    "an explicit backend": {"backend": "native"},
    "no pack": {"pack": None},
    "another number of tokens": {"pack": Pack.from_groups([(1, 5)])},
    "a pack elsewhere": {"pack": Pack.from_groups([(1, 4)], "meta")},
    "queries elsewhere": {"q": X.to("meta")},
    "keys elsewhere": {"k": X.to("meta")},
    "values elsewhere": {"v": X.to("meta")},
    "a shape of keys": {"k": X[:, :, :4]},
    "a shape of values": {"v": X[:2]},
    "a type of keys": {"k": X.bfloat16()},
    "a type of values": {"v": X.bfloat16()},
    "a type without kernels": dict.fromkeys("qkv", X.double()),
    "no heads": dict.fromkeys("qkv", X[:, 0]),
    "strided queries": {"q": X.transpose(0, 2).contiguous().transpose(0, 2)},
    "strided keys": {"k": X.transpose(0, 2).contiguous().transpose(0, 2)},
    "strided values": {"v": X.transpose(0, 2).contiguous().transpose(0, 2)},
    "no head dimension": dict.fromkeys("qkv", X[:, :, :0]),
    "an infinite scale": {"scale": float("inf")},
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_attention_is_usual_only_where_no_check_could_refuse(name: str):
    usual = {"q": X, "k": X, "v": X, "pack": Pack.from_groups([(1, 4)])}
    usual |= {"scale": None, "backend": None}
    assert is_usual(**usual)
    assert not is_usual(**(usual | UNUSUAL[name]))
    with use_backend("reference"):
        assert not is_usual(**usual)
