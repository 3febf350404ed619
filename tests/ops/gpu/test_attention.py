"""A GPU's attention at DINOv2's sizes: outside autograd, into strided views, without waiting.

Without a GPU, TRITON_INTERPRET=1 runs Triton's part on the CPU, slowly.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_fast.ops.attention import attention, attention_backward, attention_forward
from dinov2_fast.packing import Pack
from tests.inputs import leaves, randn
from tests.tolerance import assert_within_error_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu

SCALE = 0.125
# flash-attn sums in any order at every length unless asked, others past 264 tokens.
DETERMINISTIC = {"flash_attn": True}
CROPS = ((4, 257), (16, 50))  # two images: 224 and 98 px at patch 14
ODD = ((1, 1), (3, 17), (2, 0), (1, 131))  # a token alone, primes, empty sequences
# More lengths than launches: one launch with programs that find nothing to do.
MANY = ((1, 3), (2, 64), (1, 65), (1, 0), (1, 127), (1, 1), (2, 129))
CASES = [
    pytest.param(groups, heads, head_dim, dtype, id=name)
    for name, groups, heads, head_dim, dtype in [
        ("ViT-S", CROPS, 6, 64, torch.bfloat16),
        ("ViT-B", CROPS, 12, 64, torch.bfloat16),
        ("ViT-L", CROPS, 16, 64, torch.bfloat16),
        ("ViT-g", CROPS, 24, 64, torch.bfloat16),
        ("518px", ((2, 1370),), 6, 64, torch.bfloat16),
        ("8192 tokens", ((1, 8192),), 1, 64, torch.bfloat16),
        ("odd", ODD, 3, 64, torch.bfloat16),
        ("many", MANY, 3, 64, torch.bfloat16),
        ("none", (), 3, 64, torch.bfloat16),
        ("float16", CROPS, 6, 64, torch.float16),
        ("float32", CROPS, 6, 64, torch.float32),
        ("head 128", CROPS, 3, 128, torch.bfloat16),
        ("head 96", ODD, 3, 96, torch.bfloat16),
        ("head 80", CROPS, 3, 80, torch.bfloat16),
        ("head 72", ODD, 3, 72, torch.float16),
        ("head 32", CROPS, 3, 32, torch.bfloat16),
        ("head 13", ODD, 3, 13, torch.float16),
    ]
]


def make_inputs(
    pack: Pack, heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values as views of one tensor, and the gradient of the output."""
    qkv = randn(pack.num_tokens, 3, heads, head_dim, dtype=dtype, device=DEVICE)
    d_out = randn(pack.num_tokens, heads, head_dim, dtype=dtype, device=DEVICE, seed=1)
    return *qkv.unbind(1), d_out


def forward_backward(
    kernels: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    pack: Pack,
    q_pack: Pack | None = None,
) -> tuple[Tensor, ...]:
    """Output, lse and the gradients, those of keys and values written into views of one tensor."""
    options = {"scale": SCALE, "q_pack": q_pack, "backend": kernels}
    out, lse = attention_forward(q, k, v, pack, **options)
    d_q = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    d_k, d_v = k.new_full((k.shape[0], 2, *k.shape[1:]), torch.nan).unbind(1)
    gradients = {"d_q": d_q, "d_k": d_k, "d_v": d_v}
    options["deterministic"] = DETERMINISTIC.get(kernels)
    attention_backward(d_out, q, k, v, lse, pack, **gradients, out=out, **options)
    return out, lse, d_q, d_k, d_v


def by_autograd(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, pack: Pack) -> list[Tensor]:
    """Output and gradients of the differentiable reference."""
    inputs = leaves(q, k, v)
    out = attention(*inputs, pack, scale=SCALE, backend="reference")
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


@pytest.mark.parametrize(("groups", "heads", "head_dim", "dtype"), CASES)
def test_matches_reference(kernels, groups, heads, head_dim, dtype):
    if kernels == "native" and (head_dim != 64 or dtype == torch.float32):
        pytest.skip("native: heads of 64 in 16 bits")
    if kernels == "flash_attn" and (head_dim % 8 or dtype == torch.float32):
        pytest.skip("flash_attn: heads of a multiple of 8 in 16 bits")
    pack = Pack.from_groups(groups, DEVICE)
    inputs = make_inputs(pack, heads, head_dim, dtype)
    out, _, *gradients = forward_backward(kernels, *inputs, pack)
    low = by_autograd(*inputs, pack)
    truth = by_autograd(*(x.double() for x in inputs), pack)
    names = ("out", "d_q", "d_k", "d_v")
    for name, found, one, exact in zip(names, (out, *gradients), low, truth, strict=True):
        assert_within_error_budget(found, low_precision=one, truth=exact, name=name)


@pytest.mark.parametrize("groups", [CROPS, ODD])
def test_differentiable_op_equals_the_functions_outside_autograd(kernels, groups):
    pack = Pack.from_groups(groups, DEVICE)
    q, k, v, d_out = make_inputs(pack, 3, 64, torch.bfloat16)
    expected, _, *expected_gradients = forward_backward(kernels, q, k, v, d_out, pack)
    inputs = leaves(q, k, v)
    out = attention(
        *inputs, pack, scale=SCALE, deterministic=DETERMINISTIC.get(kernels), backend=kernels
    )
    gradients = torch.autograd.grad(out, inputs, d_out)
    assert torch.equal(out, expected)
    assert all(map(torch.equal, gradients, expected_gradients))


def test_some_queries_give_the_rows_of_all(kernels):
    pack = Pack.from_groups([(2, 257), (3, 50), (1, 0), (2, 1)], DEVICE)
    chosen = torch.cat([torch.arange(0, 300, 7), torch.arange(514, pack.num_tokens, 3)])
    bounds = zip(pack.offsets_host, pack.offsets_host[1:], strict=False)
    lengths = [int(((chosen >= a) & (chosen < b)).sum()) for a, b in bounds]
    q_pack, chosen = Pack.from_lengths(lengths, DEVICE), chosen.to(DEVICE)
    q, k, v, d_out = make_inputs(pack, 3, 64, torch.bfloat16)
    others = torch.ones(pack.num_tokens, dtype=torch.bool, device=DEVICE)
    others[chosen] = False
    d_out[others] = 0

    whole = forward_backward(kernels, q, k, v, d_out, pack)
    some = forward_backward(kernels, q[chosen], k, v, d_out[chosen], pack, q_pack)

    expected = (whole[0][chosen], whole[1][:, chosen], whole[2][chosen], *whole[3:])
    for name, found, full in zip(("out", "lse", "d_q", "d_k", "d_v"), some, expected, strict=True):
        distance = (found.float() - full.float()).norm() / full.float().norm()
        assert distance.item() <= torch.finfo(torch.bfloat16).eps, f"{name}: {distance}"


def test_large_scores_and_foreign_nan_do_no_harm(kernels):
    if kernels == "flash_attn":
        pytest.skip("it loads whole tiles, across the end of a sequence")
    pack = Pack.from_groups([(1, 70), (1, 50), (1, 70)], DEVICE)
    q, k, v, d_out = make_inputs(pack, 2, 64, torch.bfloat16)
    expected = forward_backward(kernels, 100 * q, k, v, d_out, pack)
    assert all(x.isfinite().all() for x in expected)
    poisoned = [x.clone() for x in (100 * q, k, v, d_out)]
    for x in poisoned:
        x[70:120] = torch.nan
    found = forward_backward(kernels, *poisoned, pack)
    for one, other in zip(found, expected, strict=True):
        if one.shape[0] != pack.num_tokens:  # lse
            one, other = one.t(), other.t()
        assert torch.equal(one[:70], other[:70])
        assert torch.equal(one[120:], other[120:])
        assert one[70:120].isnan().any()


def test_every_run_gives_the_same_bits_and_waits_for_nothing(kernels):
    pack = Pack.from_groups(CROPS, DEVICE)
    inputs = make_inputs(pack, 6, 64, torch.bfloat16)
    first = forward_backward(kernels, *inputs, pack)
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        again = forward_backward(kernels, *inputs, pack)
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, first, again))
