"""The projection head: keys, start values, normalisation, precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from dinov2_fast.nn import DINOHead, Prototypes
from tests.inputs import randn


def small(**options) -> DINOHead:
    return DINOHead(8, 12, **{"hidden_dim": 16, "bottleneck_dim": 6, **options})


def test_keys_are_those_of_dinov2():
    shapes = {key: tuple(value.shape) for key, value in small().state_dict().items()}

    assert shapes == {
        "mlp.0.weight": (16, 8),
        "mlp.0.bias": (16,),
        "mlp.2.weight": (16, 16),
        "mlp.2.bias": (16,),
        "mlp.4.weight": (6, 16),
        "mlp.4.bias": (6,),
        "last_layer.weight_g": (12, 1),
        "last_layer.weight_v": (12, 6),
    }


@pytest.mark.parametrize(
    ("nlayers", "layers"),
    [(1, ["mlp"]), (2, ["mlp.0", "mlp.2"]), (4, ["mlp.0", "mlp.2", "mlp.4", "mlp.6"])],
)
def test_number_of_layers(nlayers, layers):
    head = small(nlayers=nlayers)
    weights = [key for key in head.state_dict() if key.startswith("mlp") and "weight" in key]

    assert weights == [f"{layer}.weight" for layer in layers]
    assert head(randn(3, 8)).shape == (3, 12)


def test_known_value():
    head = small(nlayers=1).double()
    torch.nn.init.eye_(head.mlp.weight)
    torch.nn.init.zeros_(head.mlp.bias)
    with torch.no_grad():
        head.last_layer.weight_v.zero_()
        head.last_layer.weight_v[:, 0] = 5  # any length: only the direction counts
        head.last_layer.weight_g.fill_(2)
    x = torch.tensor([[3.0, 4, 0, 0, 0, 0, 0, 0]], dtype=torch.float64)

    assert head(x).tolist() == [[2 * 3 / 5] * 12]


def test_equals_torch_weight_norm():
    head, x = small().double(), randn(5, 8, dtype=torch.float64)
    linear = torch.nn.utils.parametrizations.weight_norm(
        torch.nn.Linear(6, 12, bias=False)
    ).double()
    state = head.last_layer.state_dict()
    linear.load_state_dict(
        {
            "parametrizations.weight.original0": state["weight_g"],
            "parametrizations.weight.original1": state["weight_v"],
        }
    )

    expected = linear(F.normalize(head.mlp(x), dim=-1))

    torch.testing.assert_close(head(x), expected, rtol=1e-13, atol=1e-15)


def test_start_values():
    head = DINOHead(384, 1000)
    weights = head.mlp[0].weight

    assert abs(weights.std().item() - 0.02) < 0.02 * 0.01  # 786,432 draws: error about 0.1 %
    assert weights.abs().max() < 6 * 0.02
    assert all(not head.mlp[i].bias.any() for i in (0, 2, 4))
    assert head.last_layer.weight_g.eq(1).all()
    bound = 1 / math.sqrt(256)  # torch's own Linear: uniform, and not drawn over
    assert 0.99 * bound < head.last_layer.weight_v.abs().max() <= bound


def test_the_length_of_prototypes_is_trained():
    head = small()

    head(randn(5, 8)).square().sum().backward()

    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_rows_of_the_weight_have_the_learnt_length():
    prototypes = Prototypes(6, 12).double()
    with torch.no_grad():
        prototypes.weight_g.copy_(torch.arange(12.0).unsqueeze(1) - 3)

    lengths = prototypes.weight.norm(dim=1)

    torch.testing.assert_close(lengths, (torch.arange(12.0).double() - 3).abs(), rtol=1e-14, atol=0)


def test_a_zero_token_gives_zero_scores_not_nan():
    head = small(nlayers=1)
    torch.nn.init.zeros_(head.mlp.bias)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scores = head.to(dtype)(torch.zeros(2, 8, dtype=dtype))
        assert torch.equal(scores, torch.zeros(2, 12, dtype=dtype))


def test_the_length_of_a_token_does_not_matter_however_short_it_is():
    head = DINOHead(4, 6, bottleneck_dim=4, nlayers=1)
    x = randn(3, 4)
    torch.testing.assert_close(head(x * 1e-8), head(x))


def test_reset_draws_all_parameters_anew():
    head = small()
    for parameter in head.parameters():
        torch.nn.init.constant_(parameter, float("nan"))

    head.reset_parameters()

    assert all(parameter.isfinite().all() for parameter in head.parameters())


def test_rejects_no_layers():
    with pytest.raises(ValueError, match="head: expected nlayers of at least 1, got 0"):
        small(nlayers=0)
