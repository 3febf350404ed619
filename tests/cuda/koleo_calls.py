"""What tests of KoLeo's kernels on PTX compare their outputs with."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast.ops.koleo import koleo_reference
from tests.tolerance import assert_within_error_budget

EPS = 1e-8
Outputs = dict[str, Tensor]


def among_nan(x: Tensor) -> Tensor:
    """A copy of rows further apart than they are long, with NaN in between."""
    rows, channels = x.shape
    wide = torch.full((rows, channels + 4), torch.nan)
    wide[:, :channels] = x
    return wide[:, :channels]


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    leaf = x.clone().requires_grad_()
    loss = koleo_reference(leaf, eps=EPS)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def assert_matches_reference(x: Tensor, out: Outputs) -> None:
    """Errors of the losses' mean and of dx are within twice those of the reference in float32."""
    low, truth = reference(x), reference(x.double())
    for name, found, low_precision, exact in (
        ("loss", out["losses"].double().mean().float(), low[0], truth[0]),
        ("gradient", out["dx"], low[1], truth[1]),
    ):
        assert_within_error_budget(
            found, low_precision=low_precision, truth=exact, name=f"koleo.{name}"
        )


def same(a: Outputs, b: Outputs) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)
