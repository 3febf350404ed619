"""Attention within sequences: against torch, between forms of input, its probabilities."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dinov2_fast.nn import Attention, MemEffAttention
from dinov2_fast.packing import Pack, pack_tokens
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget


def torch_attention(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    """The layer by torch's own attention: qkv laid out [3, heads, D], scale D^-0.5."""
    batch, length, dim = x.shape
    qkv = layer.qkv(x).view(batch, length, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(*qkv)  # [B, H, N, D]
    return layer.proj(out.transpose(1, 2).reshape(batch, length, dim))


@pytest.mark.parametrize("shape", [(2, 50, 384), (1, 1, 128), (3, 7, 64)])
def test_matches_torch(shape):
    layer, x = Attention(shape[2], shape[2] // 64), randn(*shape)

    out, low_precision = layer(x), torch_attention(layer, x)
    truth = torch_attention(layer.double(), x.double())

    assert_within_error_budget(out, low_precision=low_precision, truth=truth, name="attention")


def test_a_pack_of_one_group_is_the_same_computation():
    layer, x = Attention(64, 2), randn(3, 5, 64)
    tokens, pack = pack_tokens([x])

    assert torch.equal(layer(tokens, pack), layer(x).flatten(0, 1))


@pytest.mark.parametrize("lengths", [(4, 6, 4), (5, 5, 5)])  # alone, and in the midst of a run
def test_no_token_sees_another_sequence(lengths):
    layer, pack = Attention(32, 2), Pack.from_lengths(lengths)
    _, begin, end, _ = pack.offsets_host
    x = randn(pack.num_tokens, 32)
    disturbed = x.clone()
    disturbed[begin:end] = float("nan")

    out, poisoned = layer(x, pack), layer(disturbed, pack)

    assert torch.equal(out[:begin], poisoned[:begin])
    assert torch.equal(out[end:], poisoned[end:])


def test_weights_reproduce_the_output():
    layer, x = Attention(32, 2).double(), randn(2, 6, 32, dtype=torch.float64)
    tokens, pack = pack_tokens([x])

    (weights,) = layer.weights(tokens, pack)
    values = layer.qkv(x).view(2, 6, 3, 2, 16)[:, :, 2].transpose(1, 2)  # [B, H, N, D]
    out = layer.proj((weights @ values).transpose(1, 2).flatten(2))

    assert weights.shape == (2, 2, 6, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 6).double(), rtol=1e-14, atol=0)
    torch.testing.assert_close(out, layer(x), rtol=1e-12, atol=1e-14)


def test_keys():
    expected = ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]

    assert list(Attention(8, 2, qkv_bias=True).state_dict()) == expected
    assert list(Attention(8, 2, proj_bias=False).state_dict()) == expected[::2]
    assert (Attention(32).num_heads, Attention(32).qkv.bias) == (8, None)  # as in DINOv2
    assert MemEffAttention is Attention


def test_rejects_bad_input():
    layer, pack = Attention(8, 2), Pack.from_lengths([3])

    with pytest.raises(ValueError, match="multiple of num_heads, got dim 8 and num_heads 3"):
        Attention(8, 3)
    with pytest.raises(ValueError, match="got dim 8 and num_heads 0"):
        Attention(8, 0)
    with pytest.raises(ValueError, match="attention: expected proj_drop 0"):
        Attention(8, 2, proj_drop=0.1)
    with pytest.raises(ValueError, match=r"with a pack or \[B, N, C\] without one, got \(3, 8\)"):
        layer(torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"got \(1, 3, 8\) with a pack"):
        layer(torch.zeros(1, 3, 8), pack)
    with pytest.raises(ValueError, match=r"the 3 tokens of its pack, got \(4, 8\)"):
        layer(torch.zeros(4, 8), pack)
