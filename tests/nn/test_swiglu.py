"""The SwiGLU layer: widths, keys, which half is the gate."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dinov2_fast.nn import SwiGLUFFN, SwiGLUFFNFused
from dinov2_fast.nn.swiglu import swiglu_hidden_features
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget


@pytest.mark.parametrize(
    ("dim", "hidden"),
    [(384, 1024), (768, 2048), (1024, 2736), (1536, 4096), (64, 176)],  # L and 64 are rounded up
)
def test_hidden_width_is_two_thirds_rounded_up_to_eight(dim, hidden):
    assert swiglu_hidden_features(4 * dim) == hidden


def test_two_thirds_are_truncated_before_they_are_rounded_up():
    assert swiglu_hidden_features(13) == 8  # 8.67, which no width of 4 C comes to


def test_keys_and_widths():
    shapes = {key: tuple(v.shape) for key, v in SwiGLUFFNFused(64, 256).state_dict().items()}

    assert shapes == {
        "w12.weight": (352, 64),
        "w12.bias": (352,),
        "w3.weight": (64, 176),
        "w3.bias": (64,),
    }


def test_only_the_fused_one_reduces_the_hidden_width():
    assert SwiGLUFFN(64, 256).w12.out_features == 512
    assert SwiGLUFFN(64).w3.in_features == 64
    assert SwiGLUFFNFused(64).w3.in_features == 48


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (0, 24)])
def test_first_half_is_the_gate(shape):
    layer, x = SwiGLUFFN(24, 96), randn(*shape)

    def expected(layer: SwiGLUFFN, x: torch.Tensor) -> torch.Tensor:
        gate, value = layer.w12(x).chunk(2, dim=-1)
        return layer.w3(F.silu(gate) * value)

    out, low_precision = layer(x), expected(layer, x)
    truth = expected(layer.double(), x.double())

    assert_within_error_budget(out, low_precision=low_precision, truth=truth, name="swiglu")
