"""Attention by products of bf16 matrices: AMX and AVX-512, and their definitions everywhere."""

from __future__ import annotations

import pytest
import torch

from dinov2_fast import environment, native
from dinov2_fast.ops import _attention_native
from dinov2_fast.ops.attention import attention_forward
from dinov2_fast.packing import Pack
from tests.inputs import GROUPS, make_qkv, randn
from tests.ops.without_autograd.test_attention import (
    HEAD_DIMS,
    SCALE,
    by_autograd,
    forward_backward,
)
from tests.ops.without_autograd.test_attention import (
    test_threads_change_no_bit as threads_change_no_bit,
)
from tests.tolerance import assert_within_error_budget

DEFINED = ("defined_avx512_bf16", "defined_amx")


@pytest.fixture(params=[*DEFINED, "avx512_bf16", "amx"])
def products(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, on_native: None
) -> str:
    """Every instruction that multiplies bf16 matrices, computed in C++ and, where it is, itself."""
    if request.param not in (*DEFINED, *native.cpu_levels()):
        pytest.skip(f"this processor has {', '.join(native.cpu_levels())}")
    monkeypatch.setattr(environment, "cpu_level", lambda: request.param)
    return request.param


def compare(groups: tuple[tuple[int, int], ...], head_dim: int) -> None:
    """Output, lse and gradients against float64, by the error of the reference in bf16."""
    pack = Pack.from_groups(groups)
    q, k, v = make_qkv(pack, head_dim=head_dim, dtype=torch.bfloat16)
    d_out = randn(*q.shape, dtype=torch.bfloat16, seed=1)
    wide = (q.double(), k.double(), v.double())

    out, lse, *gradients = forward_backward(q, k, v, d_out, pack, None, "native")
    low_out, low_lse, *low = forward_backward(q, k, v, d_out, pack, None, "reference")
    exact_out, *exact = by_autograd(*wide, d_out.double(), pack)
    exact_lse = attention_forward(*wide, pack, scale=SCALE, backend="reference")[1]

    assert_within_error_budget(lse, low_precision=low_lse, truth=exact_lse, name="lse")
    names = ("out", "d_q", "d_k", "d_v")
    candidates = zip((out, *gradients), (low_out, *low), (exact_out, *exact), strict=True)
    for name, (found, one, truth) in zip(names, candidates, strict=True):
        assert_within_error_budget(found, low_precision=one, truth=truth, name=name)


@pytest.mark.parametrize("name", DEFINED)
def test_a_definition_is_a_product_of_matrices(name: str, on_native: None):
    assert native.module().defined_bf16_products_agree_cpu(name)


def test_products_of_this_processor_come_out_right(on_native: None):
    if not {"avx512_bf16", "amx"} & set(native.cpu_levels()):
        pytest.skip(f"this processor has {', '.join(native.cpu_levels())}")
    assert native.wrong_bf16_products() == ()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_equals_the_differentiable_reference(products, groups, head_dim):
    compare(groups, head_dim)


# Backward, 1370 keys leave room for blocks of 64 queries, 289 for one of 288 and one of a query.
@pytest.mark.parametrize("length", [289, pytest.param(1370, marks=pytest.mark.slow)])
def test_long_sequences_in_blocks_of_queries(products, length: int):
    compare(((1, length),), 16)


def test_takes_products_of_its_own(products, monkeypatch):
    # Weights that are rounded before their product show in the output.
    pack = Pack.from_groups([(1, 65)])
    q, k, v = make_qkv(pack, head_dim=64, dtype=torch.bfloat16)
    found = attention_forward(q, k, v, pack, scale=SCALE, backend="native")
    monkeypatch.setattr(environment, "cpu_level", lambda: "baseline")
    by_floats = attention_forward(q, k, v, pack, scale=SCALE, backend="native")
    assert not torch.equal(found[0], by_floats[0])


def test_float32_has_no_products_of_its_own(monkeypatch, on_native: None):
    monkeypatch.setattr(environment, "cpu_level", lambda: "defined_amx")
    pack = Pack.from_lengths([3])
    with pytest.raises(ValueError, match="got 'defined_amx'"):
        attention_forward(*make_qkv(pack), pack, scale=SCALE, backend="native")


@pytest.mark.parametrize(("queries", "keys"), [(1, 257), (33, 17), (0, 5), (7, 0), (50, 50)])
def test_fewer_or_more_queries_than_keys(products, queries: int, keys: int):
    # With a second sequence, whose place shows when the first is counted wrong.
    q_pack, pack = Pack.from_lengths([queries, 19]), Pack.from_lengths([keys, 23])
    q = randn(queries + 19, 2, 64, dtype=torch.bfloat16)
    k, v = (randn(keys + 23, 2, 64, dtype=torch.bfloat16, seed=s) for s in (1, 2))
    d_out = randn(*q.shape, dtype=torch.bfloat16, seed=3)

    found = forward_backward(q, k, v, d_out, pack, q_pack, "native")
    low = forward_backward(q, k, v, d_out, pack, q_pack, "reference")
    wide = [x.double() for x in (q, k, v, d_out)]
    truth = forward_backward(*wide, pack, q_pack, "reference")
    for name, one, other, exact in zip(
        ("out", "lse", "d_q", "d_k", "d_v"), found, low, truth, strict=True
    ):
        assert_within_error_budget(one, low_precision=other, truth=exact, name=name)


# The longest queries and keys are not of one sequence: blocks are largest where keys are few.
@pytest.mark.parametrize(
    ("queries", "keys"),
    [((300, 40), (100, 1370)), ((288, 1), (341, 342)), ((700,), (1,)), ((1,), (700,)), ((), ())],
)
@pytest.mark.parametrize("backward", [False, True])
def test_stays_within_its_scratch(
    products, queries: tuple[int, ...], keys: tuple[int, ...], backward: bool
):
    q, d_out = (randn(sum(queries), 1, 40, dtype=torch.bfloat16, seed=s) for s in (0, 1))
    k, v = (randn(sum(keys), 1, 40, dtype=torch.bfloat16, seed=s) for s in (2, 3))
    offsets = [Pack.from_lengths(lengths).offsets for lengths in (queries, keys)]
    lse = None if backward else torch.zeros(1, sum(queries))
    tensors = (q, k, v, q.clone())
    if backward:
        tensors = (q, k, v, d_out, q.clone(), k.clone(), v.clone())
    arguments = _attention_native._arguments(tensors, lse, *offsets, SCALE)
    run = getattr(native.module(), f"attention_{'backward' if backward else 'forward'}_cpu")
    floats = run(*arguments, torch.empty(1).data_ptr(), 0)  # too few: says how many it needs
    scratch = torch.full((floats + 65536,), 7.0)  # a block of queries too many ends in there

    assert run(*arguments, scratch.data_ptr(), floats) == 0
    assert torch.equal(scratch[floats:], torch.full((65536,), 7.0))


@pytest.mark.parametrize("poisoned", [0, 1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_non_finite_sequence_leaves_the_others_bit_equal(products, poisoned: int, value: float):
    # One thread computes all sequences in the same scratch, one after the other.
    pack = Pack.from_lengths([33, 17, 5])
    clean = [*make_qkv(pack, head_dim=40, dtype=torch.bfloat16)]
    clean.append(randn(*clean[0].shape, dtype=torch.bfloat16, seed=1))
    expected = forward_backward(*clean, pack, None, "native")
    begin, end = pack.offsets_host[poisoned : poisoned + 2]
    others = torch.ones(pack.num_tokens, dtype=torch.bool)
    others[begin:end] = False
    for position in range(4):
        inputs = [x.clone() for x in clean]
        inputs[position][begin + 1] = value
        found = forward_backward(*inputs, pack, None, "native")
        assert not all(x.isfinite().all() for x in found)
        for index, (one, before) in enumerate(zip(found, expected, strict=True)):
            if index == 1:  # lse is [H, T]
                assert torch.equal(one[:, others], before[:, others])
            else:
                assert torch.equal(one[others], before[others])


def test_an_infinite_value_is_as_in_the_reference(products):
    # The last of an odd number of tokens has no neighbour: its pair must hold 0, not itself again,
    # which a weight of 0 would make NaN.
    pack = Pack.from_lengths([17])
    q, k, v = (x.clone() for x in make_qkv(pack, head_dim=64, dtype=torch.bfloat16))
    v[16, :, 3] = torch.inf
    out, _ = attention_forward(q, k, v, pack, scale=SCALE, backend="native")
    expected, _ = attention_forward(q, k, v, pack, scale=SCALE, backend="reference")
    assert expected.isposinf().any()
    assert torch.equal(out.isposinf(), expected.isposinf())
    assert not out.isnan().any()


def test_threads_change_no_bit(products):
    threads_change_no_bit(None)


def test_strides_change_no_bit(products):
    pack = Pack.from_groups([(2, 17), (1, 5)])
    strided = make_qkv(pack, head_dim=64, dtype=torch.bfloat16)
    assert not strided[0].is_contiguous()
    d_out = randn(*strided[0].shape, dtype=torch.bfloat16, seed=1)
    found = forward_backward(*strided, d_out, pack, None, "native")
    contiguous = [x.contiguous() for x in strided]
    expected = forward_backward(*contiguous, d_out, pack, None, "native")
    assert all(map(torch.equal, found, expected))


def test_subnormal_inputs_are_zeros(products):
    # Both instructions take them for zeros; keys of 2^100 would make them large otherwise.
    pack = Pack.from_lengths([3])
    q = torch.full((3, 1, 32), 2.0**-130, dtype=torch.bfloat16)
    k = randn(3, 1, 32, dtype=torch.bfloat16, scale=2.0**100)
    v = randn(3, 1, 32, dtype=torch.bfloat16)
    _, lse = attention_forward(q, k, v, pack, scale=2.0**30, backend="native")
    assert torch.equal(lse, torch.full_like(lse, lse[0, 0].item()))
    torch.testing.assert_close(lse[0, 0], torch.tensor(3.0).log())


@pytest.mark.parametrize("scale", [-0.25, 0.1])
def test_any_scale(products, scale: float):
    pack = Pack.from_lengths([33])
    q, k, v = make_qkv(pack, head_dim=64, dtype=torch.bfloat16)
    out, lse = attention_forward(q, k, v, pack, scale=scale, backend="native")
    low, low_lse = attention_forward(q, k, v, pack, scale=scale, backend="reference")
    wide = [x.double() for x in (q, k, v)]
    exact, exact_lse = attention_forward(*wide, pack, scale=scale, backend="reference")
    assert_within_error_budget(out, low_precision=low, truth=exact, name="out")
    assert_within_error_budget(lse, low_precision=low_lse, truth=exact_lse, name="lse")
