"""Triton kernels at sizes that no tile divides: among poison, and with warps in any order.

Around every tensor lies NaN, behind its rows too, or a number. Whatever a mask lets in by mistake
ends in a result; whatever is stored beside a tensor, NaN that came of NaN too, replaces the number.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_fast import environment
from tests.cuda.moved_arguments import same_bits
from tests.cuda.triton_memory import executed
from tools.triton_report import calls
from tools.triton_report.calls import CALLS, Call, gelu

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(environment.triton_interpreted(), reason="Triton interprets")

NUMBER = 3.0  # that no kernel computes of itself
PADDING = 16  # elements: poisoned rows begin where clean ones do, at whole vectors
LAUNCHES = [pytest.param(call, marks=[] if call is gelu else pytest.mark.slow) for call in CALLS]


@pytest.fixture(autouse=True)
def sizes_with_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, one column and one prototype past what tiles take at once, and none of them even."""
    monkeypatch.setattr(calls, "ROWS", 17)
    monkeypatch.setattr(calls, "WIDTH", 129)
    monkeypatch.setattr(calls, "PROTOTYPES", 1025)


def among(filling: float, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """A copy with something before, between and behind its rows, and the memory that holds both."""
    if numbers.ndim == 1:
        memory = numbers.new_full((len(numbers) + 2 * PADDING,), filling)
        return memory[PADDING:-PADDING].copy_(numbers), memory
    rows, *inner = numbers.shape
    width = numbers[0].numel()
    memory = numbers.new_full((rows + 2, -(-width // PADDING) * PADDING + PADDING), filling)
    inside = memory[1:-1, :width].unflatten(1, inner)
    return inside.copy_(numbers), memory


@pytest.mark.parametrize("launch", LAUNCHES)
def test_what_lies_around_tensors_changes_nothing_and_stays(
    launch: Call, monkeypatch: pytest.MonkeyPatch
):
    def surrounded(filling: float) -> tuple[list[Tensor], list[Tensor]]:
        memories: list[Tensor] = []

        def place(numbers: Tensor, _: int) -> Tensor:
            tensor, memory = among(filling, numbers)
            memories.append(memory)
            return tensor

        tensors, launched = executed(launch, place, monkeypatch)
        assert launched == CALLS[launch]
        return tensors, memories

    # Both alike: strides are part of what is compiled, and with it the order of sums.
    expected, memories = surrounded(NUMBER)
    found, _ = surrounded(torch.nan)
    assert all(map(same_bits, found, expected))
    for tensor, memory in zip(expected, memories, strict=False):  # sums have memory of their own
        tensor.fill_(NUMBER)  # with what it held gone, nothing else may be left
        assert (memory == NUMBER).all()


@pytest.mark.parametrize("launch", LAUNCHES)
def test_the_order_of_warps_changes_no_bit(launch: Call, monkeypatch: pytest.MonkeyPatch):
    def place(numbers: Tensor, _: int) -> Tensor:
        return numbers

    expected, _ = executed(launch, place, monkeypatch)
    found, _ = executed(launch, place, monkeypatch, schedule=1)
    assert all(map(same_bits, found, expected))
