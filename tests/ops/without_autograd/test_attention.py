"""Attention outside autograd: fewer queries than keys, gradients into given views."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from torch import Tensor

from dinov2_fast import native
from dinov2_fast.ops import _attention_native
from dinov2_fast.ops._attention_kernels import are_of_a_gpu
from dinov2_fast.ops.attention import attention, attention_backward, attention_forward
from dinov2_fast.packing import Pack
from tests.inputs import DTYPES, GROUPS, leaves, make_qkv, randn, score_rounding
from tests.tolerance import assert_within_error_budget

SCALE = 0.25
# Lengths that native kernels on the CPU compute by dot products, and the first that they do not.
FEW_TOKENS = ((1, 1), (2, 2), (1, 3), (2, 4), (1, 5))
HEAD_DIMS = [64, 16, 72, 128, 3]  # the tuned one, the smallest, a vector and a half, two, odd


def forward_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    pack: Pack,
    q_pack: Pack | None,
    backend: str,
    *,
    like: str = "",
) -> tuple[Tensor, ...]:
    """Output, lse and the three gradients, the latter written into views of one tensor.

    The backward pass is given lse where `backend` reads it; the reference, where `like` does.
    """
    out, lse = attention_forward(q, k, v, pack, scale=SCALE, q_pack=q_pack, backend=backend)
    d_kv = torch.full((k.shape[0], 2, *k.shape[1:]), torch.nan, dtype=k.dtype)
    d_q = torch.full(q.shape, torch.nan, dtype=q.dtype)
    d_k, d_v = d_kv.unbind(1)
    attention_backward(
        d_out,
        q,
        k,
        v,
        lse if are_of_a_gpu(q, like or backend) else None,
        pack,
        scale=SCALE,
        d_q=d_q,
        d_k=d_k,
        d_v=d_v,
        q_pack=q_pack,
        backend=backend,
    )
    return out, lse, d_q, d_k, d_v


def by_autograd(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, pack: Pack) -> list[Tensor]:
    """Output and gradients of the differentiable reference."""
    inputs = leaves(q, k, v)
    out = attention(*inputs, pack, scale=SCALE, backend="reference")
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [*GROUPS, FEW_TOKENS], ids=str)
def test_equals_the_differentiable_reference(backend, groups, dtype, head_dim):
    pack = Pack.from_groups(groups)
    q, k, v = make_qkv(pack, head_dim=head_dim, dtype=dtype)
    d_out = randn(*q.shape, dtype=dtype, seed=1)

    out, _, *gradients = forward_backward(q, k, v, d_out, pack, None, backend)
    # Weights made again from a rounded logarithm are less exact than those of the softmax.
    given = (q, k, v, d_out, pack, None)
    reference_out, _, *low = forward_backward(*given, "reference", like=backend)
    low = (reference_out, *low)
    truth = by_autograd(q.double(), k.double(), v.double(), d_out.double(), pack)

    names = ("out", "d_q", "d_k", "d_v")
    rounding = score_rounding(d_out, q, k, v, scale=SCALE)
    for name, found, one, exact in zip(names, (out, *gradients), low, truth, strict=True):
        # One key has a weight of 1, whatever the query.
        cancelled = rounding if name in ("d_q", "d_k") and not exact.any() else 0.0
        assert_within_error_budget(
            found, low_precision=one, truth=exact, name=name, cancelled=cancelled
        )


def test_the_reference_is_the_differentiable_one_in_float64():
    pack = Pack.from_groups([(2, 65), (3, 17), (1, 1)])
    q, k, v = make_qkv(pack, head_dim=5, dtype=torch.float64)
    d_out = randn(*q.shape, dtype=torch.float64, seed=1)
    out, _, *gradients = forward_backward(q, k, v, d_out, pack, None, "reference")
    for found, expected in zip((out, *gradients), by_autograd(q, k, v, d_out, pack), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_some_queries_give_the_rows_of_all(backend, dtype):
    pack = Pack.from_groups([(2, 257), (3, 50), (1, 0), (2, 1), (5, 4)])
    chosen = torch.cat([torch.arange(0, 300, 7), torch.arange(514, pack.num_tokens, 3)])
    lengths = [
        int(((chosen >= a) & (chosen < b)).sum())
        for a, b in zip(pack.offsets_host, pack.offsets_host[1:], strict=False)
    ]
    q, k, v = make_qkv(pack, head_dim=64, dtype=dtype)
    d_out = torch.zeros(q.shape, dtype=dtype)
    d_out[chosen] = randn(len(chosen), *q.shape[1:], dtype=dtype, seed=1)

    whole = forward_backward(q, k, v, d_out, pack, None, backend)
    q_pack = Pack.from_lengths(lengths)
    some = forward_backward(q[chosen], k, v, d_out[chosen], pack, q_pack, backend)

    expected = (whole[0][chosen], whole[1][:, chosen], whole[2][chosen], *whole[3:])
    for name, found, full in zip(("out", "lse", "d_q", "d_k", "d_v"), some, expected, strict=True):
        tolerance = torch.finfo(dtype).eps * 4
        distance = (found.float() - full.float()).norm() / full.float().norm()
        assert distance.item() <= tolerance, f"{name}: {distance}"


def test_long_sequences_in_blocks_of_queries(backend):
    pack = Pack.from_groups([(1, 1370), (1, 2049)])
    q, k, v = make_qkv(pack, num_heads=1, head_dim=16)
    d_out = randn(*q.shape, seed=1)

    out, _, *gradients = forward_backward(q, k, v, d_out, pack, None, backend)
    low = by_autograd(q, k, v, d_out, pack)
    truth = by_autograd(q.double(), k.double(), v.double(), d_out.double(), pack)

    for found, one, exact in zip((out, *gradients), low, truth, strict=True):
        assert_within_error_budget(found, low_precision=one, truth=exact, name="attention")


# The longest sequence promised; five queries see all of its keys, so that float64 has room.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eight_thousand_keys(backend, dtype):
    pack, q_pack = Pack.from_lengths([8192, 3]), Pack.from_lengths([5, 2])
    k, v = (randn(8195, 2, 16, dtype=dtype, seed=s) for s in (1, 2))
    q, d_out = (randn(7, 2, 16, dtype=dtype, seed=s) for s in (3, 4))

    found = forward_backward(q, k, v, d_out, pack, q_pack, backend)
    low = forward_backward(q, k, v, d_out, pack, q_pack, "reference", like=backend)
    wide = [x.double() for x in (q, k, v, d_out)]
    truth = forward_backward(*wide, pack, q_pack, "reference")

    for name, one, other, exact in zip(
        ("out", "lse", "d_q", "d_k", "d_v"), found, low, truth, strict=True
    ):
        assert_within_error_budget(one, low_precision=other, truth=exact, name=name)


def test_every_instruction_set_is_as_good(level):
    for groups in (((2, 65), (3, 17)), FEW_TOKENS):
        test_equals_the_differentiable_reference("native", groups, torch.float32, 64)


def test_threads_change_no_bit(on_native: None):
    pack = Pack.from_groups([(3, 65), (5, 17)])
    q, k, v = make_qkv(pack, num_heads=3, head_dim=64, dtype=torch.bfloat16)
    d_out = randn(*q.shape, dtype=torch.bfloat16, seed=1)
    one = forward_backward(q, k, v, d_out, pack, None, "native")
    torch.set_num_threads(3)
    try:
        three = forward_backward(q, k, v, d_out, pack, None, "native")
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, one, three))


def test_a_backend_that_reads_lse_says_that_it_is_missing(monkeypatch):
    pack = Pack.from_groups([(2, 3)])
    q, k, v = make_qkv(pack)
    gradients = {name: torch.empty_like(q) for name in ("d_q", "d_k", "d_v")}
    monkeypatch.setattr("dinov2_fast.ops.attention.are_of_a_gpu", lambda *_: True)
    monkeypatch.setattr("dinov2_fast.ops.attention.choose", lambda *_, **__: "triton")
    with pytest.raises(ValueError, match="backend 'triton' reads lse, got None; choose one"):
        attention_backward(q, q, k, v, None, pack, scale=SCALE, **gradients)


def _bits_with_one_thread() -> list[list[float]]:
    torch.set_num_threads(1)
    pack = Pack.from_groups([(3, 65)])
    q, k, v = make_qkv(pack, num_heads=3, head_dim=64)
    return [x.tolist() for x in forward_backward(q, k, v, q, pack, None, "native")]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_computes_after_the_parent_used_threads(on_native: None):
    test_threads_change_no_bit(on_native)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_bits_with_one_thread).get(timeout=60) == _bits_with_one_thread()


def test_rejects_packs_that_do_not_belong_together():
    pack = Pack.from_groups([(2, 3)])
    q, k, v = make_qkv(pack)
    with pytest.raises(ValueError, match="q_pack must have the 2 sequences of pack, got 1"):
        attention_forward(q, k, v, pack, scale=1.0, q_pack=Pack.from_groups([(1, 6)]))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_extension_itself_says_what_came(direction: str):
    if native.why_not():
        pytest.skip(native.why_not())
    rows, numbers = torch.zeros(2, 1, 3), torch.zeros(4096)
    offsets = torch.tensor([0, 2], dtype=torch.int32)
    count = 4 if direction == "forward" else 7
    good = {"tensors": ((rows.data_ptr(), 3, 3),) * count, "lse": numbers.data_ptr()}
    good |= dict.fromkeys(("query_offsets", "key_offsets"), offsets.data_ptr())
    good |= {"scratch": numbers.data_ptr(), "floats_per_thread": 4096, "sequences": 1}
    good |= {"num_queries": 2, "heads": 1, "head_dim": 3, "scale": 1.0, "dtype": "float32"}
    good |= {"threads": 1, "level": "auto"}
    run = getattr(native.module(), f"attention_{direction}_cpu")
    for change, message in [
        ({"sequences": -1}, "sequences must not be negative, got -1"),
        ({"num_queries": -2}, "num_queries must not be negative, got -2"),
        ({"heads": -3}, "heads must not be negative, got -3"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"key_offsets": 0}, "key_offsets must not be a null pointer"),
        ({"tensors": ((0, 3, 3),) * 3}, f"expected {count} tensors, got 3"),
        ({"dtype": "int8"}, "q must be float32 or bfloat16, got int8"),
    ]:
        with pytest.raises(ValueError, match=f"attention_{direction}_cpu: {message}"):
            run(**(good | change))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_extension_says_what_scratch_it_needs_and_takes_the_stack_s(direction: str):
    if native.why_not():
        pytest.skip(native.why_not())
    pack = Pack.from_lengths([9, 3])  # vectors of tokens and dot products, which divide it unlike
    q, k, v = make_qkv(pack)
    lse = attention_forward(q, k, v, pack, scale=SCALE, backend="native")[1]
    run = getattr(native.module(), f"attention_{direction}_cpu")

    def written(*scratch: int) -> tuple[int, list[torch.Tensor]]:
        results = [torch.zeros(q.shape) for _ in range(3 if direction == "backward" else 1)]
        tensors = (q, k, v, *([randn(*q.shape)] if direction == "backward" else []), *results)
        offsets = (pack.offsets, pack.offsets)
        arguments = _attention_native._arguments(tensors, lse, *offsets, SCALE)
        return run(*arguments, *scratch), results

    needed, untouched = written(q.data_ptr(), 0)
    memory = torch.empty(needed * torch.get_num_threads())
    assert not any(x.any() for x in untouched)
    assert written(memory.data_ptr(), needed - 1)[0] == needed
    done, given = written(memory.data_ptr(), needed)
    on_stack, own = written()
    assert (done, on_stack) == (0, 0)
    assert all(x.any() for x in given)
    assert all(map(torch.equal, given, own))
