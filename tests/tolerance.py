"""The one tolerance of the tests: the error that the reference makes in the same precision."""

from __future__ import annotations

import torch
from torch import Tensor

REFERENCE_ERRORS = 2  # a candidate may sum in another order, not in a lower precision


def assert_within_error_budget(
    out: Tensor, *, low_precision: Tensor, truth: Tensor, name: str, cancelled: float = 0.0
) -> None:
    """Compare a result with the float64 truth, by the error the reference makes in that precision.

    Both the largest and the root-mean-square error may be at most twice the reference's own, plus
    one unit in the last place of the output type. Infinities and NaN must stand where the truth
    has them.

    Args:
        out: the result.
        low_precision: the reference computed from the same inputs in the type of out.
        truth: the reference computed in float64 from those inputs.
        name: what is compared, for the message.
        cancelled: rounding error, allowed too, of float32 sums of which the result is a difference.
    Raises:
        AssertionError: over budget, or another shape, type or pattern of non-finite values.
    """
    assert truth.dtype == torch.float64, f"{name}: the truth must be float64, got {truth.dtype}"
    assert out.shape == truth.shape, f"{name}: shape {tuple(out.shape)}, not {tuple(truth.shape)}"
    assert out.dtype == low_precision.dtype, f"{name}: {out.dtype}, not {low_precision.dtype}"
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(out), kind(truth)), (
            f"{name}: {kind.__name__} is not as in the truth"
        )
    finite = truth.isfinite()
    if not finite.any():
        return
    expected = truth[finite]
    error = (out.double()[finite] - expected).abs()
    reference_error = (low_precision.double()[finite] - expected).abs()
    last_place = torch.finfo(out.dtype).eps
    for norm, measure in {"largest": torch.amax, "root-mean-square": _root_mean_square}.items():
        budget = REFERENCE_ERRORS * measure(reference_error) + last_place * measure(expected.abs())
        budget += cancelled
        assert measure(error) <= budget, (
            f"{name}: {norm} error {measure(error):.3g} is over the budget {budget:.3g} "
            f"(reference {measure(reference_error):.3g}, values up to {expected.abs().max():.3g})"
        )


def _root_mean_square(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
