from __future__ import annotations

import pytest
import torch

from tests.inputs import randn
from tests.tolerance import assert_within_error_budget


def reference(dtype: torch.dtype) -> torch.Tensor:
    x = randn(64, 64, dtype=torch.bfloat16).to(dtype)
    return x @ x


def budget_accepts(out: torch.Tensor) -> bool:
    low_precision, truth = reference(torch.bfloat16), reference(torch.float64)
    try:
        assert_within_error_budget(out, low_precision=low_precision, truth=truth, name="product")
    except AssertionError:
        return False
    return True


def test_budget_accepts_the_reference_and_the_rounded_truth():
    assert budget_accepts(reference(torch.bfloat16))
    assert budget_accepts(reference(torch.float64).bfloat16())


def test_budget_refuses_one_wrong_element():
    out = reference(torch.bfloat16)
    out[3, 5] += 0.5
    assert not budget_accepts(out)


def test_budget_refuses_a_small_error_everywhere():
    out = reference(torch.float64)
    noise = randn(*out.shape, seed=1)
    low = reference(torch.bfloat16)
    rounding_error = (low.double() - out).square().mean().sqrt()
    out = (out + 10 * rounding_error * noise.sign()).bfloat16()
    assert not budget_accepts(out)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_budget_refuses_non_finite_values_the_truth_does_not_have(value: float):
    out = reference(torch.bfloat16)
    out[0, 0] = value
    assert not budget_accepts(out)


def test_budget_refuses_another_shape_or_type():
    assert not budget_accepts(reference(torch.bfloat16)[:1])
    assert not budget_accepts(reference(torch.float32))


def test_budget_of_exact_arithmetic_is_one_unit_in_the_last_place():
    truth = torch.tensor([1.0], dtype=torch.float64)
    low = torch.tensor([1.0])
    one_off = torch.nextafter(low, torch.tensor([2.0]))
    assert_within_error_budget(one_off, low_precision=low, truth=truth, name="one")
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_error_budget(low + 1e-6, low_precision=low, truth=truth, name="one")


def test_budget_of_what_cancels_is_what_its_sums_may_be_off_by():
    zero = torch.zeros(1, dtype=torch.float64)
    for off, fits in ((1e-6, True), (2e-6, False)):
        options = {"low_precision": zero.float(), "truth": zero, "cancelled": 1.5e-6}
        try:
            assert_within_error_budget(zero.float() + off, name="zero", **options)
        except AssertionError:
            assert not fits
        else:
            assert fits
