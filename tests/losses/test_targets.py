"""Teacher targets: Sinkhorn-Knopp against the published recipe in float64; the moving centre."""

from __future__ import annotations

import math

import pytest
import torch

from dinov2_fast import distributed
from dinov2_fast.config import LossConfig
from dinov2_fast.losses import targets as targets_module
from dinov2_fast.losses.targets import SinkhornCentering, SoftmaxCentering, build_centering


def published_sinkhorn(logits: torch.Tensor, temperature: float, iterations: int) -> torch.Tensor:
    """Rows and columns normalised in turn on the stored matrix, as the publications write it."""
    q = (logits / temperature).exp().T  # [K, R]
    num_prototypes, num_rows = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / num_prototypes
        q = q / q.sum(dim=0, keepdim=True) / num_rows
    return (q * num_rows).T


@pytest.mark.parametrize("temperature", [0.04, 0.07])
@pytest.mark.parametrize(("rows", "prototypes"), [(8, 64), (1, 7), (37, 16)])
def test_sinkhorn_targets_match_the_published_recipe(rows, prototypes, temperature):
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, prototypes, generator=generator, dtype=torch.float64) * 0.3
    found = SinkhornCentering(num_iterations=3)(logits, temperature=temperature).probabilities()
    torch.testing.assert_close(found, published_sinkhorn(logits, temperature, 3))
    torch.testing.assert_close(found.sum(dim=1), torch.ones(rows, dtype=torch.float64))


def test_sinkhorn_survives_scores_whose_exponential_overflows():
    logits = torch.randn(6, 9, dtype=torch.float64) * 30  # exp(30 / 0.04) is far beyond float64
    found = SinkhornCentering(num_iterations=3)(logits, temperature=0.04).probabilities()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(6, dtype=torch.float64))


def test_softmax_centering_known_values():
    centering = SoftmaxCentering(2, momentum=0.9)
    first = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    found = centering(first, temperature=1.0).probabilities()
    sigmoid = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(found[:, 0], torch.full((2,), sigmoid))
    # The mean (2, 1) of the first call enters with weight 0.1 and shifts the second call only.
    found = centering(first, temperature=0.5).probabilities()
    shifted = 1 / (1 + math.exp(-(1 - 0.1) / 0.5))
    torch.testing.assert_close(found[:, 0], torch.full((2,), shifted))


def test_softmax_centering_uses_the_centre_of_the_steps_before_this_one():
    generator = torch.Generator().manual_seed(2)
    centering = SoftmaxCentering(19, momentum=0.9).double()
    truth_center = torch.zeros(19, dtype=torch.float64)
    for step in range(5):
        logits = torch.randn(6, 19, generator=generator, dtype=torch.float64) + step
        found = centering(logits, temperature=0.05).probabilities()
        torch.testing.assert_close(found, torch.softmax((logits - truth_center) / 0.05, dim=1))
        truth_center = 0.9 * truth_center + 0.1 * logits.mean(dim=0)
    torch.testing.assert_close(centering.center, truth_center)


def test_centre_averages_the_means_of_processes_not_their_rows(monkeypatch):
    # Another process brings 100 rows of mean 4; this one 2 rows of mean 1.
    def with_other_process(message: torch.Tensor, group: object = None) -> torch.Tensor:
        return message.add_(torch.cat((torch.full((3,), 4.0), torch.ones(1))))

    monkeypatch.setattr(targets_module, "all_reduce_sum", with_other_process)
    centering = SoftmaxCentering(3, momentum=0.5)
    centering(torch.ones(2, 3), temperature=1.0)
    assert torch.equal(centering.center, torch.full((3,), 0.5 * (1 + 4) / 2))


def test_a_process_without_rows_has_no_say_in_the_centre(monkeypatch):
    def with_other_process(message: torch.Tensor, group: object = None) -> torch.Tensor:
        return message.add_(torch.cat((torch.full((3,), 4.0), torch.ones(1))))

    monkeypatch.setattr(targets_module, "all_reduce_sum", with_other_process)
    centering = SoftmaxCentering(3, momentum=0.5)
    found = centering(torch.zeros(0, 3), temperature=1.0)
    assert found.log_v.shape == (0,)
    assert torch.equal(centering.center, torch.full((3,), 0.5 * 4))


@pytest.mark.parametrize(
    "logits", [torch.zeros(0, 3), torch.tensor([[0.0, float("nan"), 1.0]])], ids=["empty", "nan"]
)
def test_a_batch_without_a_finite_mean_leaves_the_centre(logits):
    centering = SoftmaxCentering(3, momentum=0.9)
    centering(torch.randn(4, 3), temperature=1.0)
    before = centering.center.clone()
    centering(logits, temperature=1.0)
    assert before.any()
    assert torch.equal(centering.center, before)


def test_the_configuration_chooses_the_centering_and_its_settings():
    assert not distributed.is_initialized()
    sinkhorn = build_centering(LossConfig(sinkhorn_iterations=5), num_prototypes=8)
    assert isinstance(sinkhorn, SinkhornCentering)
    assert sinkhorn.num_iterations == 5
    softmax = build_centering(
        LossConfig(centering="softmax_centering", center_momentum=0.7), num_prototypes=8
    )
    assert isinstance(softmax, SoftmaxCentering)
    assert (softmax.momentum, softmax.center.shape) == (0.7, (8,))
    assert list(softmax.state_dict()) == ["center"]
