"""What the optimizer's kernel does with a step that the device says to skip.

On the CPU the op looks at the flag itself, so that no other test without a GPU gets there.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from dinov2_fast import environment
from tests.cuda.moved_arguments import same_bits
from tests.cuda.triton_memory import executed
from tools.triton_report.calls import optimizer

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(environment.triton_interpreted(), reason="Triton interprets")

GRADIENTS = (2, 3)  # by the order in which the call makes its tensors, two of each list


@pytest.mark.parametrize("skip", [True, False])
def test_a_skipped_step_changes_nothing_whatever_the_gradients_hold(
    skip: bool, monkeypatch: pytest.MonkeyPatch
):
    before: list[Tensor] = []

    def place(numbers: Tensor, _: int) -> Tensor:
        if len(before) in GRADIENTS:
            numbers.fill_(torch.nan)
        before.append(numbers.clone())
        return numbers

    after, launched = executed(functools.partial(optimizer, skip=skip), place, monkeypatch)
    assert launched == 2
    lists = range(10)  # the clip coefficient follows
    changed = [not same_bits(before[i], after[i]) for i in lists]
    assert changed == [not skip and i not in GRADIENTS for i in lists]
