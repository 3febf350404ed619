"""A plugin of pytest: Triton's backend on the CPU executes PTX instead of Triton's interpreter.

`SIMT_ARCH=90 pytest -p tests.cuda.triton_on_ptx tests/ops -k triton`; without it for sm_80.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Sequence
from typing import Any

import dinov2_fast.kernels
from dinov2_fast.ops import _optimizer_triton
from tools.simt.triton_launch import triton_on_cpu

for module in pkgutil.iter_modules(dinov2_fast.kernels.__path__):
    importlib.import_module(f"dinov2_fast.kernels.{module.name}")
# After the kernels were made for a GPU: now the ops believe that the CPU interprets them.
os.environ["TRITON_INTERPRET"] = "1"
TABLES: dict[int, Sequence[Any]] = {}
_running = triton_on_cpu(int(os.environ.get("SIMT_ARCH", "80")), tables=TABLES)
RESULTS = _running.__enter__()

_table_of = _optimizer_triton.table_of


def _known_table(lists: Any, **options: Any) -> Any:
    """The optimizer's table, with a note of the tensors whose addresses it holds."""
    table = _table_of(lists, **options)
    TABLES.clear()
    TABLES[table.numbers.data_ptr()] = table.tensors
    return table


_optimizer_triton.table_of = _known_table


def pytest_terminal_summary(terminalreporter) -> None:
    warps = sum(result.num_warp_instructions for result in RESULTS)
    terminalreporter.write_line(f"{len(RESULTS)} launches executed {warps} warp instructions")
