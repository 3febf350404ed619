"""No CUDA kernel moves in vectors what does not begin at a multiple of 16 bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.cuda import native_on_ptx
from tests.cuda.moved_arguments import arguments_moved
from tools.kernel_report.cases import Run, Types, as_it_is
from tools.kernel_report.loss_cases import run_cross_entropy, run_koleo, run_sinkhorn
from tools.kernel_report.row_cases import (
    run_gelu,
    run_layer_norm,
    run_stochastic_depth,
    run_swiglu,
)

pytestmark = pytest.mark.skipif(bool(native_on_ptx.why_not()), reason=native_on_ptx.why_not())

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
SLOW = pytest.mark.slow


def unaligned(tensor: Tensor) -> Tensor:
    """A copy that begins one element past a multiple of 16 bytes."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    storage = tensor.new_empty(reach + 2)
    return storage.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


@pytest.mark.parametrize(
    ("run", "types", "least"),
    [
        # One of each way by which run.cuh chooses vectors, and the others.
        (run_stochastic_depth, (FLOAT, BFLOAT), 7),
        (run_gelu, (BFLOAT, BFLOAT), 6),
        pytest.param(run_layer_norm, (FLOAT, BFLOAT), 12, marks=SLOW),
        pytest.param(run_swiglu, (BFLOAT, BFLOAT), 6, marks=SLOW),
        pytest.param(run_sinkhorn, (HALF,), 8, marks=SLOW),
        pytest.param(run_cross_entropy, (FLOAT, HALF), 12, marks=SLOW),
        pytest.param(run_koleo, (FLOAT,), 9, marks=SLOW),
    ],
)
def test_any_one_tensor_alone_may_be_unaligned(run: Run, types: Types, least: int):
    def is_one(chosen: int) -> bool:
        """Whether so many tensors of floats are given, with that one of them unaligned."""
        numbers = itertools.count()

        def move(tensor: Tensor, has_rows: bool) -> Tensor | None:
            del has_rows
            counts = tensor.is_floating_point()
            return unaligned(tensor) if counts and next(numbers) == chosen else None

        with native_on_ptx.native_on_ptx(), arguments_moved(move):
            list(run((3, 24), types, as_it_is, "native"))  # whole vectors; else a fault
        return chosen < next(numbers)

    assert next(number for number in itertools.count() if not is_one(number)) >= least
