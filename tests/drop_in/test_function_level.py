"""flash-attn's and xFormers' calls: results of attention itself, and what is refused by name."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from dinov2_fast.drop_in import xformers as fmha
from dinov2_fast.drop_in.flash_attn import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
)
from dinov2_fast.drop_in.xformers import (
    BlockDiagonalMask,
    index_select_cat,
    memory_efficient_attention,
    scaled_index_add,
    unbind,
)
from tests.inputs import leaves, randn
from tests.tolerance import assert_within_error_budget

# A 98 px crop, a single token, and a tile edge with one past it.
LENGTHS = (50, 1, 64, 65)
OFFSETS = torch.tensor([0, 50, 51, 115, 180], dtype=torch.int32)
HEADS, HEAD_DIM = 2, 64


def one_by_one(q, k, v, scale=None):
    """Each sequence of [T, H, D] by PyTorch's own attention."""
    parts = []
    for begin, end in pairwise(OFFSETS.tolist()):
        heads_first = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads_first, scale=scale)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


def with_gradients(function, *tensors):
    """Output and gradients of a weighted sum of it."""
    out = function(*tensors)
    weights = randn(out.numel(), seed=7).view(out.shape).to(out.dtype)
    return out, *torch.autograd.grad(out, tensors, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("form", ["separate", "packed", "xformers"])
def test_sequences_end_to_end(form, scale, dtype):
    qkv = randn(sum(LENGTHS), 3, HEADS, HEAD_DIM, dtype=dtype)

    def run(qkv):
        q, k, v = qkv.unbind(1)
        if form == "packed":
            return flash_attn_varlen_qkvpacked_func(qkv, OFFSETS, 65, softmax_scale=scale)
        if form == "separate":
            lengths = (OFFSETS, OFFSETS.clone(), 65, 65)
            return flash_attn_varlen_func(q, k, v, *lengths, 0.0, scale, False, deterministic=True)
        mask = BlockDiagonalMask.from_seqlens(LENGTHS)
        return memory_efficient_attention(q[None], k[None], v[None], mask, scale=scale)[0]

    def reference(qkv):
        return one_by_one(*qkv.unbind(1), scale=scale)

    found = with_gradients(run, *leaves(qkv))
    low = with_gradients(reference, *leaves(qkv))
    truth = with_gradients(reference, *leaves(qkv, dtype=torch.float64))
    for out, low_precision, expected in zip(found, low, truth, strict=True):
        assert_within_error_budget(out, low_precision=low_precision, truth=expected, name=form)


@pytest.mark.parametrize("form", ["separate", "packed", "xformers"])
def test_batches(form):
    qkv = randn(3, 17, 3, HEADS, HEAD_DIM)
    separate = {"separate": flash_attn_func, "xformers": memory_efficient_attention}

    def run(qkv):
        if form == "packed":
            return flash_attn_qkvpacked_func(qkv)
        return separate[form](*qkv.unbind(2))

    def reference(qkv):
        heads_first = (x.transpose(1, 2) for x in qkv.unbind(2))
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    found = with_gradients(run, *leaves(qkv))
    low = with_gradients(reference, *leaves(qkv))
    truth = with_gradients(reference, *leaves(qkv, dtype=torch.float64))
    for out, low_precision, expected in zip(found, low, truth, strict=True):
        assert_within_error_budget(out, low_precision=low_precision, truth=expected, name=form)


def test_a_list_of_batches_becomes_one_and_comes_back():
    batches = [randn(2, 5, HEADS, HEAD_DIM), randn(3, 2, HEADS, HEAD_DIM, seed=1)]

    mask, x = fmha.BlockDiagonalMask.from_tensor_list(batches)

    assert x.shape == (1, 16, HEADS, HEAD_DIM)
    assert all(torch.equal(a, b) for a, b in zip(mask.split(x), batches, strict=True))
    together = mask.split(memory_efficient_attention(x, x, x, mask))
    for batch, out in zip(batches, together, strict=True):
        alone = memory_efficient_attention(batch, batch, batch)
        assert (out - alone).norm() <= 1e-6 * alone.norm()
    by_lengths = BlockDiagonalMask.from_seqlens([5, 5, 2, 2, 2])
    assert [part.shape[:2] for part in by_lengths.split(x)] == [(1, 5)] * 2 + [(1, 2)] * 3
    by_lengths._batch_sizes = [2, 3]  # as DINOv2's code does
    assert [part.shape[:2] for part in by_lengths.split(x)] == [(2, 5), (3, 2)]


def test_a_branch_of_chosen_samples_in_the_words_of_dinov2s_block():
    # Two of four samples of 5 tokens, one of three of 2.
    batches, kept = [randn(4, 5, 128), randn(3, 2, 128, seed=1)], [[2, 0], [1]]
    weight, gamma = leaves(0.1 * randn(128, 384, seed=2), randn(128, seed=3))
    indices = [torch.tensor(samples) for samples in kept]

    def with_xformers_names():
        rows = [x.clone() for x in batches]
        tokens = index_select_cat([x.flatten(1) for x in rows], indices).view(1, -1, 128)
        mask = fmha.fmha.BlockDiagonalMask.from_seqlens([5, 5, 2], device="cpu")
        mask._batch_sizes = [2, 1]
        qkv = (tokens @ weight).view(1, -1, 3, HEADS, HEAD_DIM)
        out = memory_efficient_attention(*unbind(qkv, 2), mask).flatten(2)
        added = zip(rows, indices, mask.split(out), strict=True)
        outs = [
            scaled_index_add(x, index, part, scaling=gamma, alpha=len(x) / len(index))
            for x, index, part in added
        ]
        assert all(out is x for out, x in zip(outs, rows, strict=True))
        return outs

    def sample_by_sample():
        outs = [[*x] for x in batches]
        for out, samples in zip(outs, kept, strict=True):
            for i in samples:
                qkv = (out[i] @ weight).unflatten(1, (3, HEADS, HEAD_DIM)).permute(1, 2, 0, 3)
                branch = F.scaled_dot_product_attention(*qkv).transpose(0, 1).flatten(1)
                out[i] = out[i] + branch * gamma * len(out) / len(samples)
        return [torch.stack(out) for out in outs]

    results = []
    for outs in (with_xformers_names(), sample_by_sample()):
        loss = sum(out.square().sum() for out in outs)
        results.append([*outs, *torch.autograd.grad(loss, (weight, gamma))])

    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dropout_p": 0.1}, ValueError, "expected dropout_p 0, got 0.1; DINOv2 trains without"),
        ({"causal": True}, ValueError, "expected causal False, got True; use torch.nn.functional"),
        ({"window_size": (8, 8)}, ValueError, "window_size.*flex_attention"),
        ({"softcap": 5.0}, ValueError, "softcap.*flex_attention"),
        ({"alibi_slopes": torch.ones(2)}, ValueError, "alibi_slopes.*a tensor.*flex_attention"),
        ({"return_attn_probs": True}, ValueError, "return_attn_probs.*attention_weights"),
        ({"block_table": 1}, ValueError, "block_table.*flash-attn"),
        ({"causl": True}, TypeError, "flash_attn_func: expected an argument of flash-attn, got ca"),
    ],
)
def test_flash_attn_refuses_what_it_cannot_do_by_name(options, error, words):
    q = randn(1, 3, HEADS, HEAD_DIM)
    with pytest.raises(error, match=words):
        flash_attn_func(q, q, q, **options)


def test_what_asks_for_nothing_is_taken():
    q = randn(1, 3, HEADS, HEAD_DIM)
    plain = {"window_size": [-1, -1], "softcap": 0.0, "alibi_slopes": None, "deterministic": False}

    assert torch.equal(flash_attn_func(q, q, q, **plain), flash_attn_func(q, q, q))


def test_rejects_bad_input():
    q, mask = randn(1, 4, HEADS, HEAD_DIM), BlockDiagonalMask.from_seqlens([3, 1])
    grouped = q[:, :, :1]
    other = torch.tensor([0, 3, 4], dtype=torch.int32)
    lengths = (torch.tensor([0, 4], dtype=torch.int32), other, 4, 4)
    attend = memory_efficient_attention
    for call, error, words in (
        (partial(flash_attn_func, q, grouped, grouped), ValueError, "q, k and v of one shape"),
        (partial(flash_attn_qkvpacked_func, q), ValueError, r"qkv \[B, N, 3, H, D\]"),
        (partial(flash_attn_varlen_qkvpacked_func, q, other, 3), ValueError, r"qkv \[T, 3, H, D\]"),
        (partial(flash_attn_varlen_func, q[0], q[0], q[0], *lengths), ValueError, "cu_seqlens_k"),
        (partial(attend, q, grouped, grouped), ValueError, "one shape"),
        (partial(attend, q[0], q[0], q[0]), ValueError, r"unsqueeze\(2\) a single head"),
        (partial(attend, *[q[:, :3]] * 3, mask), ValueError, "attn_bias of the 3 tokens.*one of 4"),
        (partial(attend, q, q, q, p=0.1), ValueError, "expected p 0"),
        (partial(attend, q, q, q, op=1), ValueError, "use dinov2_fast.use_backend"),
        (partial(attend, q, q, q, torch.ones(4, 4)), TypeError, "got Tensor; use torch"),
        (partial(attend, *[q.expand(2, -1, -1, -1)] * 3, mask), ValueError, "from_tensor_list"),
        (partial(BlockDiagonalMask.from_seqlens, [3], [4]), ValueError, "kv_seqlen None or equal"),
        (partial(mask.split, q[0]), ValueError, r"split: expected tensor \[1, T"),
        (partial(index_select_cat, [q[0]], []), ValueError, "indices for each of 1 sources, got 0"),
    ):
        with pytest.raises(error, match=words):
            call()
    mask._batch_sizes = [2]
    with pytest.raises(ValueError, match="equally long"):
        mask.split(q)
