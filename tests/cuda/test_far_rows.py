"""Offsets past 32 bits: every CUDA and Triton kernel on matrices whose rows lie far apart.

Rows are in memory that exists only where it is touched, at their own addresses. An offset that is
cut to 32 bits, signed or not, is an access out of bounds; so is one by another matrix's stride, as
no two matrices have the same.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast import environment
from dinov2_fast.ops import _optimizer_cuda
from dinov2_fast.ops._optimizer_table import Table, Write, table_of
from tests.cuda import native_on_ptx
from tests.cuda.moved_arguments import arguments_moved, same_bits
from tests.cuda.triton_memory import executed
from tools.kernel_report.attention_cases import run_attention, run_in_order
from tools.kernel_report.cases import Run, as_it_is
from tools.kernel_report.loss_cases import (
    run_cross_entropy,
    run_koleo,
    run_optimizer,
    run_sinkhorn,
)
from tools.kernel_report.row_cases import (
    STREAM_AND_BRANCH,
    run_gelu,
    run_layer_norm,
    run_stochastic_depth,
    run_swiglu,
)
from tools.triton_report.calls import CALLS, Call, gelu

ROW_STRIDES = range(2**30 + 64, 2**31, 64)  # elements: the third row is past 31 bits, the fifth 32
ROWS = 5
LONG = 2**32  # elements before a chunk of a long tensor; whole chunks
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # of Linux; Python names it from 3.11 on

needs_native = pytest.mark.skipif(bool(native_on_ptx.why_not()), reason=native_on_ptx.why_not())


def far_apart(tensor: Tensor, row_stride: int) -> Tensor:
    """A copy with rows that far apart, in elements; of a vector, one like it."""
    if tensor.ndim < 2:
        return tensor.clone()
    num_bytes = len(tensor) * row_stride * tensor.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = torch.frombuffer(mmap.mmap(-1, num_bytes, flags), dtype=tensor.dtype)
    return memory.as_strided(tensor.shape, (row_stride, *tensor.stride()[1:])).copy_(tensor)


def long_table_of(lists: Sequence[Sequence[Tensor | None]], *, chunk: int, write: Write) -> Table:
    """The table of lists whose first tensors begin LONG elements before those that are given.

    CTAs are of the last chunks alone: the first one's number is counted from below zero.
    """
    table = table_of(lists, chunk=chunk, write=write)
    *addresses, sizes, first_chunks = table.numbers.clone().view(-1, table.num_tensors)
    for listed, of_list in zip(lists, addresses, strict=True):
        if listed[0] is not None:
            of_list[0] -= LONG * listed[0].element_size()
    sizes[0] += LONG
    first_chunks[0] -= LONG // chunk
    return dataclasses.replace(table, numbers=torch.cat([*addresses, sizes, first_chunks]))


def outputs(run: Run, sizes: tuple[int, ...], types: Any) -> list[Tensor]:
    """What the CUDA kernels of a run's calls returned."""
    calls = run(sizes, types, as_it_is, "native")
    return [tensor for _, found in calls for tensor in found.values()]


FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
SLOW = pytest.mark.slow


@needs_native
@pytest.mark.parametrize(
    ("run", "sizes", "types"),
    [
        *(
            # In vectors, and a prime width in elements.
            pytest.param(run, (ROWS, width), types, id=f"{run.__name__}-{width}", marks=marks)
            for width, marks in ((72, []), (61, SLOW))
            for run, types in {
                run_layer_norm: STREAM_AND_BRANCH[0],
                run_stochastic_depth: STREAM_AND_BRANCH[0],
                run_gelu: STREAM_AND_BRANCH[0],
                run_swiglu: STREAM_AND_BRANCH[0],
                run_sinkhorn: (HALF,),
                run_cross_entropy: (FLOAT, HALF),
                run_koleo: (FLOAT,),
            }.items()
        ),
        pytest.param(run_attention, (7,), (BFLOAT,), id="attention", marks=SLOW),
        # More tokens than one kernel takes, by either of the backwards.
        pytest.param(run_attention, (265,), (BFLOAT,), id="attention-265", marks=SLOW),
        pytest.param(run_in_order, (265,), (BFLOAT,), id="attention-265-in-order", marks=SLOW),
    ],
)
def test_cuda_kernels_find_rows_that_are_far_apart(run: Run, sizes: tuple[int, ...], types: Any):
    with native_on_ptx.native_on_ptx():
        near = outputs(run, sizes, types)
        strides = iter(ROW_STRIDES)
        with arguments_moved(lambda x, has_rows: far_apart(x, next(strides)) if has_rows else None):
            far = outputs(run, sizes, types)
    assert next(strides) != ROW_STRIDES[0]
    assert all(map(same_bits, near, far))


@needs_native
def test_cuda_kernels_find_chunks_far_into_a_tensor(monkeypatch: pytest.MonkeyPatch):
    case = run_optimizer, (_optimizer_cuda.CHUNK + 5, 61), (FLOAT, BFLOAT)
    with native_on_ptx.native_on_ptx():
        near = outputs(*case)
        monkeypatch.setattr(_optimizer_cuda, "table_of", long_table_of)
        far = outputs(*case)
    assert all(map(same_bits, near, far))


@pytest.mark.parametrize(
    "launch", [pytest.param(call, marks=[] if call is gelu else SLOW) for call in CALLS]
)
def test_triton_kernels_find_rows_that_are_far_apart(launch: Call, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    if environment.triton_interpreted():
        pytest.skip("Triton interprets")
    near, _ = executed(launch, lambda numbers, _: numbers, monkeypatch)
    far, launched = executed(
        launch,
        lambda numbers, number: far_apart(numbers, ROW_STRIDES[number]),
        monkeypatch,
        table=long_table_of,
    )
    assert launched == CALLS[launch]
    assert all(map(same_bits, near, far))
