"""Stochastic depth of one branch: how many samples, which, and with what factor."""

from __future__ import annotations

import pytest
import torch

from dinov2_fast.nn import LayerNorm
from dinov2_fast.nn.stochastic_depth import add_branch
from dinov2_fast.packing import Pack
from tests.inputs import randn

DIM = 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ones(x: torch.Tensor, pack: Pack) -> torch.Tensor:
    """A branch that says 1 for every row it is given."""
    assert pack.num_tokens == x.shape[0]
    return torch.ones_like(x)


def kept(groups, drop_ratio, seed: int = 0) -> list[torch.Tensor]:
    """Factor [b, N] with which each token of each group received the branch."""
    pack = Pack.from_groups(groups)
    out = add_branch(
        torch.zeros(pack.num_tokens, DIM),
        pack,
        LayerNorm(DIM),
        ones,
        None,
        drop_ratio=drop_ratio,
        generator=generator(seed),
    )
    parts = out[:, 0].split(pack.group_tokens)
    return [part.view(group) for part, group in zip(parts, groups, strict=True)]


@pytest.mark.parametrize(
    ("batch", "drop_ratio", "kept_samples"),
    [
        (24, 0.4, 14),  # int(14.4): published training of L and g
        (10, 0.9, 1),  # int(10 * 0.09999999999999998) is 0, and one sample must remain
        (1, 0.3, 1),
        (64, 0.3, 44),  # int(44.8)
        (5, 0.2, 4),
    ],
)
def test_keeps_the_truncated_share_and_scales_by_b_over_m(batch, drop_ratio, kept_samples):
    (factors,) = kept([(batch, 3)], drop_ratio)

    per_sample = factors[:, 0]
    assert torch.equal(factors, per_sample.unsqueeze(1).expand(batch, 3))  # whole samples
    assert (per_sample != 0).sum().item() == kept_samples
    assert set(per_sample.tolist()) <= {0.0, torch.tensor(batch / kept_samples).item()}


def test_every_group_draws_its_own_samples():
    first, second = kept([(8, 5), (8, 2)], 0.5)

    assert (first[:, 0] != 0).sum() == (second[:, 0] != 0).sum() == 4
    assert not torch.equal(first[:, 0], second[:, 0])


def test_every_sample_is_kept_equally_often():
    draws = torch.stack([kept([(8, 1)], 0.25, seed)[0][:, 0] != 0 for seed in range(2000)])

    share = draws.float().mean(0)
    # Six standard deviations of a binomial with p = 6 / 8 over 2000 draws.
    assert (share - 0.75).abs().max() < 6 * (0.75 * 0.25 / 2000) ** 0.5


def test_the_draw_is_the_generators():
    (first,), (again,), (other,) = (kept([(32, 1)], 0.5, seed) for seed in (3, 3, 4))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_gamma_multiplies_the_branch_and_skipped_rows_stay_bitwise():
    pack, x, gamma = Pack.from_groups([(6, 2)]), randn(12, DIM), randn(DIM, seed=1)
    factor = kept([(6, 2)], 0.5)[0].flatten()

    out = add_branch(x, pack, LayerNorm(DIM), ones, gamma, drop_ratio=0.5, generator=generator())

    assert torch.equal(out[factor == 0], x[factor == 0])
    assert torch.equal(out[factor != 0], x[factor != 0] + 2 * gamma)


def test_drop_zero_takes_the_plain_sum_and_draws_nothing():
    pack, x, gamma, norm = Pack.from_groups([(2, 3)]), randn(6, DIM), randn(DIM), LayerNorm(DIM)
    source = generator()
    before = source.get_state()

    out = add_branch(x, pack, norm, lambda h, _: 3 * h, gamma, drop_ratio=0.0, generator=source)

    assert torch.equal(out, x + 3 * norm(x) * gamma)
    assert torch.equal(source.get_state(), before)


def test_gradient_of_skipped_rows_is_that_of_the_identity():
    pack, factor = Pack.from_groups([(4, 2)]), kept([(4, 2)], 0.5)[0].flatten()
    x = randn(8, DIM).requires_grad_()

    def double(h: torch.Tensor, _: Pack) -> torch.Tensor:
        return 2 * h

    out = add_branch(x, pack, LayerNorm(DIM), double, None, drop_ratio=0.5, generator=generator())
    (out * randn(8, DIM, seed=2)).sum().backward()

    identity = randn(8, DIM, seed=2)
    assert torch.equal(x.grad[factor == 0], identity[factor == 0])
    assert not torch.equal(x.grad[factor != 0], identity[factor != 0])


def test_the_stream_keeps_its_dtype_under_a_low_precision_branch():
    pack, x = Pack.from_groups([(4, 2)]), randn(8, DIM)

    out = add_branch(
        x,
        pack,
        LayerNorm(DIM),
        lambda h, _: h.bfloat16(),
        torch.ones(DIM),
        drop_ratio=0.5,
        generator=generator(),
    )

    assert out.dtype == torch.float32
