"""Stochastic depth as a module: masked like everybody's, or the branch not computed at all."""

from __future__ import annotations

import pytest
import torch

from dinov2_fast.nn import DropPath
from tests.inputs import randn


def test_masking_keeps_the_expectation_and_whole_samples():
    layer, ones = DropPath(0.25).train(), torch.ones(4000, 2, 3)

    out = layer(ones)

    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    # Five standard deviations of a mean of 4000 draws.
    assert abs(out.mean().item() - 1) <= 5 * (0.25 / 0.75 / 4000) ** 0.5


def test_a_branch_is_computed_for_the_kept_samples_only():
    layer, x, seen = DropPath(0.4).train(), randn(10, 3, 8), []

    def branch(kept):
        seen.append(len(kept))
        return 2 * kept

    out = layer.add(x, branch, generator=torch.Generator().manual_seed(0))

    assert seen == [6]
    factors = ((out - x) / x).mean(dim=(1, 2))
    expected = torch.tensor([0.0, 2 * 10 / 6])
    assert all((factor - expected).abs().min() <= 1e-4 for factor in factors)
    assert int((factors.abs() > 1e-4).sum()) == 6


def test_gradients_are_those_of_masking():
    x = randn(5, 3, 4, dtype=torch.float64).requires_grad_()
    layer, weight = DropPath(0.4).train(), randn(4, 4, dtype=torch.float64).requires_grad_()

    def run(x, weight):
        return layer.add(x, lambda kept: kept @ weight, generator=torch.Generator().manual_seed(1))

    assert torch.autograd.gradcheck(run, (x, weight))


@pytest.mark.parametrize("ratio", [0.0, None, 0.9])
def test_in_evaluation_or_without_a_ratio_nothing_is_dropped(ratio):
    layer, x = DropPath(ratio).train(ratio != 0.9), randn(3, 2, 4)

    assert torch.equal(layer(x), x)
    assert torch.equal(layer.add(x, torch.sin), x + x.sin())


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_rejects_bad_input(ratio):
    with pytest.raises(ValueError, match="DropPath: expected drop_prob"):
        DropPath(ratio)
