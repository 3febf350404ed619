"""LayerNorm is torch's, and can read a subset of rows."""

from __future__ import annotations

import copy

import torch

from dinov2_fast.backends import use_backend
from dinov2_fast.nn import LayerNorm
from tests.inputs import randn, randperm
from tests.tolerance import assert_within_error_budget


def test_equals_torch_layer_norm_on_any_leading_dimensions():
    norm, theirs = LayerNorm(48), torch.nn.LayerNorm(48, eps=1e-6)
    theirs.load_state_dict(norm.state_dict())
    truth = copy.deepcopy(theirs).double()

    for shape in ((48,), (5, 48), (2, 3, 48)):
        x = randn(*shape)
        with use_backend("reference"):
            assert torch.equal(norm(x), theirs(x))
        assert_within_error_budget(
            norm(x), low_precision=theirs(x), truth=truth(x.double()), name="LayerNorm"
        )


def test_keys_and_start_values():
    state = LayerNorm(3).state_dict()

    assert list(state) == ["weight", "bias"]
    assert state["weight"].tolist() == [1, 1, 1]
    assert state["bias"].tolist() == [0, 0, 0]


def test_rows_are_those_of_the_whole():
    norm, x = LayerNorm([16]), randn(11, 16)
    rows = randperm(11)[:4]

    assert torch.equal(norm(x, rows=rows), norm(x)[rows])


def test_eps_is_that_of_dinov2():
    x = torch.full((1, 2), 1e-3)
    x[0, 1] = -1e-3  # variance 1e-6, as large as eps: a wrong eps changes the value

    assert LayerNorm(2)(x)[0, 0].item() == torch.tensor(1e-3 / (2e-6) ** 0.5).item()
