"""The MLP is Linear, exact GELU, Linear."""

from __future__ import annotations

import math

import torch

from dinov2_fast.nn import Mlp
from tests.inputs import randn


def test_known_value_with_the_exact_gelu():
    mlp = Mlp(1, 1).double()
    for parameter in mlp.parameters():
        torch.nn.init.constant_(parameter, 1.0)

    out = mlp(torch.zeros(1, 1, dtype=torch.float64)).item()

    expected = 1 + 0.5 * (1 + math.erf(1 / math.sqrt(2)))  # gelu(1) + 1
    assert math.isclose(out, expected, rel_tol=1e-14)  # the tanh form is 1.5e-4 off


def test_keys_and_widths():
    shapes = {key: tuple(value.shape) for key, value in Mlp(4, 16, 3).state_dict().items()}

    assert shapes == {
        "fc1.weight": (16, 4),
        "fc1.bias": (16,),
        "fc2.weight": (3, 16),
        "fc2.bias": (3,),
    }


def test_works_token_by_token():
    mlp, x = Mlp(8, 32).double(), randn(2, 3, 8, dtype=torch.float64)

    assert torch.allclose(mlp(x)[1, 2], mlp(x[1, 2]), rtol=1e-14, atol=0)
