"""Calls of Triton kernels with their tensors where a test puts them in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast.ops import _optimizer_triton
from dinov2_fast.ops._optimizer_table import Table, table_of
from tests.inputs import randn
from tools.simt.faults import Checks
from tools.simt.triton_launch import triton_on_cpu
from tools.triton_report.calls import Call

MOST = 2048  # columns: of 65536 prototypes the interpreter would take minutes


def executed(
    launch: Call,
    place: Callable[[Tensor, int], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    *,
    table: Callable[..., Table] = table_of,
    schedule: str | int = "lockstep",
) -> tuple[list[Tensor], int]:
    """The tensors of a call after its kernels ran as PTX of sm_80, and how many kernels did.

    Those that the call made itself come last.

    Args:
        launch: of `tools.triton_report.calls`.
        place: a tensor and its number -> the tensor that takes its place.
        monkeypatch: of the test.
        table: of the optimizer's tensors.
        schedule: seed of a random order of warps, or all of them in lockstep.
    """
    made: list[Tensor] = []
    tables: dict[int, Sequence[Tensor]] = {}

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        numbers = randn(*(min(size, MOST) for size in shape), seed=len(made)).to(dtype)
        made.append(place(numbers, len(made)))
        return made[-1]

    def known(lists: Sequence[Sequence[Tensor | None]], **options: Any) -> Table:
        found = table(lists, **options)
        tables[found.numbers.data_ptr()] = found.tensors
        return found

    monkeypatch.setattr(_optimizer_triton, "table_of", known)
    # Triton lets all warps store what they hold alike: in lockstep that is one store, else a race.
    checks = Checks(same_store=False, race=schedule == "lockstep")
    with triton_on_cpu(80, tables=tables, schedule=schedule, checks=checks) as results:
        sums = launch(make)
    return [*made, *(tensor for tensor in sums if tensor is not None)], len(results)
