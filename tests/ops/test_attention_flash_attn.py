"""Attention by an installed flash-attn, for which stand-ins compute on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fast import flash_attention
from dinov2_fast.backends import availability, use_backend
from dinov2_fast.errors import BackendUnavailable
from dinov2_fast.ops import _attention_kernels as kernels
from dinov2_fast.ops.attention import (
    attention,
    attention_backward,
    attention_forward,
    attention_reference,
    attention_with_lse,
)
from dinov2_fast.packing import Pack
from tests.flash_attn_stand_in import SERVED, flash_attn_on_cpu
from tests.inputs import COMPILERS, leaves, make_qkv, randn
from tests.tolerance import assert_within_error_budget

SCALE = 0.25
EQUAL = [
    (((1, 257), (2, 50)), torch.bfloat16),  # a 224 px and two 98 px crops at patch 14
    (((1, 1), (1, 64), (1, 65)), torch.bfloat16),  # a token alone; a tile and one more
    (((3, 17), (1, 0), (2, 5)), torch.float16),  # primes around an empty sequence
    ((), torch.bfloat16),
]
# Lengths of the sequences of queries and of keys.
UNEQUAL = [
    ((3, 0, 70, 1, 5), (131, 7, 64, 0, 1)),  # fewer, none, more; queries without keys
    ((5, 2), (0, 0)),  # no keys at all
    ((0, 0), (5, 2)),  # no queries at all
    ((), ()),
]


@pytest.fixture(params=SERVED)
def calls(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Each release that is served, and what it was called with."""
    with flash_attn_on_cpu(request.param) as made:
        yield made


@pytest.fixture
def one() -> Iterator[list[dict[str, Any]]]:
    """The newest release, where they cannot differ."""
    with flash_attn_on_cpu(SERVED[-1]) as made:
        yield made


@pytest.mark.parametrize(("groups", "dtype"), EQUAL, ids=str)
def test_output_and_gradients_match_the_reference(calls, groups, dtype):
    pack = Pack.from_groups(groups)
    qkv = make_qkv(pack, head_dim=64, dtype=dtype)
    incoming = randn(*qkv[0].shape, dtype=dtype, seed=1)

    def outputs(dtype: torch.dtype, function: Any, **options: Any) -> list[Tensor]:
        inputs = leaves(*qkv, dtype=dtype)
        out = function(*inputs, pack, scale=SCALE, **options)
        return [out.detach(), *torch.autograd.grad(out, inputs, incoming.to(dtype))]

    found = outputs(dtype, attention, backend="flash_attn")
    low, truth = (outputs(each, attention_reference) for each in (dtype, torch.float64))
    for name, *candidates in zip(("out", "dq", "dk", "dv"), found, low, truth, strict=True):
        one, reference, exact = candidates
        assert_within_error_budget(one, low_precision=reference, truth=exact, name=name)
    assert len(calls) == (2 if groups else 0)  # a pack is one launch


@pytest.mark.parametrize(("queries", "keys"), UNEQUAL, ids=str)
def test_queries_and_keys_of_unequal_lengths_match_the_reference(calls, queries, keys):
    q_pack, pack = Pack.from_lengths(queries), Pack.from_lengths(keys)
    q, d_out = (randn(sum(queries), 2, 64, dtype=torch.bfloat16, seed=i) for i in (1, 2))
    k, v = randn(sum(keys), 2, 2, 64, dtype=torch.bfloat16).unbind(1)

    def outputs(backend: str, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        inputs = [x.to(dtype) for x in (q, k, v)]
        options = {"scale": SCALE, "q_pack": q_pack, "backend": backend}
        out, lse = attention_forward(*inputs, pack, **options)
        d_q = torch.full(q.shape, torch.nan, dtype=dtype)
        d_k, d_v = torch.full((len(k), 2, *k.shape[1:]), torch.nan, dtype=dtype).unbind(1)
        gradients = {"d_q": d_q, "d_k": d_k, "d_v": d_v}
        attention_backward(d_out.to(dtype), *inputs, lse, pack, **gradients, **options)
        return [out, lse, d_q, d_k, d_v]

    found, low = outputs("flash_attn"), outputs("reference")
    truth = outputs("reference", torch.float64)
    assert torch.equal(found[1].isinf(), low[1].isinf())
    assert (found[1][found[1].isinf()] < 0).all()
    for name, *candidates in zip(("out", "lse", "dq", "dk", "dv"), found, low, truth, strict=True):
        one, reference, exact = (x.nan_to_num(neginf=0) for x in candidates)
        assert_within_error_budget(one, low_precision=reference, truth=exact, name=name)
        assert not candidates[0].isnan().any()


def test_what_others_have_saved_does_not_count_as_changed(calls):
    pack = Pack.from_lengths([3, 2])
    x = randn(5, 2, 64, dtype=torch.bfloat16).requires_grad_()
    saved = x.exp()  # keeps its output for the backward
    attention(saved, saved, saved, pack, backend="flash_attn").sum().backward()
    assert x.grad is not None
    assert saved._version == 0


@pytest.mark.parametrize(("asked", "expected"), [(None, False), (True, True), (False, False)])
def test_sums_in_one_order_are_asked_for(one, asked, expected):
    pack = Pack.from_lengths([3, 2])
    q, k, v = leaves(*make_qkv(pack, dtype=torch.bfloat16))
    attention(q, k, v, pack, deterministic=asked, backend="flash_attn").sum().backward()
    assert one[-1]["deterministic"] is expected


def test_deterministic_algorithms_are_asked_of_torch(one):
    pack = Pack.from_lengths([3, 2])
    q, k, v = leaves(*make_qkv(pack, dtype=torch.bfloat16))
    torch.use_deterministic_algorithms(True)
    try:
        attention(q, k, v, pack, backend="flash_attn").sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert one[-1]["deterministic"] is True


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_fullgraph_from_any_offset(one, compiler):
    pack = Pack.from_groups([(2, 3), (1, 2)])
    storage = randn(3 * 8 * 2 * 64 + 1, dtype=torch.bfloat16)[1:]  # no multiple of 16 bytes
    qkv = storage.view(8, 3, 2, 64)

    def of_views(qkv: Tensor, backend: str) -> Tensor:
        return attention(*qkv.unbind(1), pack, backend=backend)

    def outputs(function: Any, qkv: Tensor, backend: str) -> list[Tensor]:
        leaf = qkv.detach().requires_grad_()
        out = function(leaf, backend)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaf)]

    compiled = torch.compile(of_views, fullgraph=True, dynamic=False, backend=compiler)
    found = outputs(compiled, qkv, "flash_attn")
    low, truth = (outputs(of_views, x, "reference") for x in (qkv, qkv.double()))
    for name, *candidates in zip(("out", "dqkv"), found, low, truth, strict=True):
        one_, reference, exact = candidates
        assert_within_error_budget(one_, low_precision=reference, truth=exact, name=name)
    with pytest.raises(BackendUnavailable, match="q must have its heads at multiples of 16 bytes"):
        outputs(of_views, qkv, "flash_attn")  # who is not traced is told


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(one):
    pack = Pack.from_lengths([3, 2])
    q, k, v = make_qkv(pack, dtype=torch.bfloat16)
    launches = kernels.launches(q, pack, pack, "flash_attn")
    for inputs in ((q, k, v), leaves(q, k, v)):
        arguments = (*inputs, pack.offsets, launches, 0.25, "flash_attn")
        torch.library.opcheck(torch.ops.dinov2_fast.attention.default, arguments)
    arguments = (q, q, k, v, None, randn(2, 5), pack.offsets, launches, 0.25, "flash_attn")
    torch.library.opcheck(torch.ops.dinov2_fast.attention_backward.default, arguments)


@pytest.mark.parametrize(
    ("shape", "dtype", "scale", "message"),
    [
        ((5, 2, 60), torch.bfloat16, 1.0, "a multiple of 8 up to 256, got 60"),
        ((5, 2, 264), torch.bfloat16, 1.0, "a multiple of 8 up to 256, got 264"),
        ((5, 2, 64), torch.float32, 1.0, "it takes float16, bfloat16, got float32"),
        ((5, 2, 64), torch.bfloat16, -1.0, "scale must be positive, got -1.0"),
        ((5, 2, 64), torch.bfloat16, 0.0, "scale must be positive, got 0.0"),
    ],
)
def test_rejects_what_the_package_does_not_take(one, shape, dtype, scale, message):
    x, pack = torch.zeros(shape, dtype=dtype), Pack.from_lengths([3, 2])
    with pytest.raises(BackendUnavailable, match=f"attention: backend 'flash_attn' .*{message}"):
        attention(x, x, x, pack, scale=scale, backend="flash_attn")
    assert not one


def test_rejects_columns_that_are_not_adjacent(one):
    x, pack = torch.zeros(5, 64, 2, dtype=torch.bfloat16).transpose(1, 2), Pack.from_lengths([5])
    with pytest.raises(BackendUnavailable, match=r"q must have adjacent columns .* got stride 2"):
        attention(x, x, x, pack, backend="flash_attn")


# lse [S, H, longest] as once, or in the type of the inputs.
@pytest.mark.parametrize(
    ("lse", "got"),
    [
        (torch.zeros(2, 2, 3), r"torch.float32 \(2, 2, 3\)"),
        (torch.zeros(2, 5, dtype=torch.bfloat16), r"torch.bfloat16 \(2, 5\)"),
    ],
    ids=["shape", "type"],
)
def test_rejects_results_in_an_unknown_form(one, lse, got, monkeypatch: pytest.MonkeyPatch):
    package = flash_attention.installed()

    def other(**arguments: Any) -> tuple[Tensor, Tensor]:
        return package.forward(**arguments)[0], lse

    found = package._replace(forward=other)
    monkeypatch.setattr(flash_attention, "_load", mock.Mock(return_value=(found, "")))
    pack = Pack.from_lengths([3, 2])
    message = rf"expected flash-attn-3 3.0.0 to return .* \(2, 5\), got .*{got}"
    with pytest.raises(BackendUnavailable, match=message):
        attention_with_lse(*make_qkv(pack, dtype=torch.bfloat16), pack, backend="flash_attn")


def test_other_ops_say_that_they_have_no_such_kernel(one):
    for device in ("cpu", "cuda"):
        reason = f"swiglu has no flash_attn kernel for {device}"
        assert availability("swiglu", device)["flash_attn"] == reason
    assert availability("attention", "cuda")["flash_attn"] == ""


def chosen(longest: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> str:
    """What automatic choice takes on a GPU for a pack with a sequence of that length."""
    pack = Pack.from_lengths([50, longest])
    with FakeTensorMode():
        q = torch.empty(pack.num_tokens, 2, 64, dtype=dtype, device="cuda")
        return kernels.choose(None, pack, pack, scale=scale, q=q, k=q, v=q)


@pytest.mark.parametrize("releases", [("3.0.0",), ("3.0.0", "2.8.3")], ids=str)
def test_long_sequences_go_to_flash_attention_3(releases, monkeypatch: pytest.MonkeyPatch):
    with flash_attn_on_cpu(*releases):
        assert [chosen(n) for n in (1, 300, 301, 1370)] == ["reference"] * 2 + ["flash_attn"] * 2
        assert chosen(1370, torch.float32) == "reference"
        assert chosen(1370, scale=-1.0) == "reference"
        with use_backend("reference"):
            assert chosen(1370) == "reference"
        monkeypatch.setenv("DINOV2_FAST_PREFER", "reference")
        assert chosen(1370) == "reference"
        monkeypatch.setenv("DINOV2_FAST_PREFER", "flash_attn")
        assert chosen(50) == "flash_attn"
        monkeypatch.setenv("DINOV2_FAST_DISABLE_KERNELS", "attention")
        assert chosen(1370) == "reference"


@pytest.mark.parametrize(("releases", "capability"), [(("2.8.3",), 9), (("3.0.0", "2.8.3"), 8)])
def test_flash_attention_2_is_taken_only_when_asked_for(
    releases, capability, monkeypatch: pytest.MonkeyPatch
):
    with flash_attn_on_cpu(*releases, capability=capability):
        assert chosen(1370) == "reference"
        monkeypatch.setenv("DINOV2_FAST_PREFER", "flash_attn")
        assert chosen(1370) == "flash_attn"
