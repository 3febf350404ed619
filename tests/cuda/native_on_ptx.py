"""A plugin of pytest: ops compute their native backend with the CUDA kernels, on the CPU.

`SIMT_ARCH=90 pytest -p tests.cuda.native_on_ptx tests/ops -k native`; without it for sm_80.
"""

from __future__ import annotations

import os
from typing import Any

from tools import simt
from tools.simt.native_launch import (
    SOURCES,
    alone,
    deletions,
    entry_of,
    native_on_ptx,
    ptx_of,
    why_not,
)

__all__ = ["SOURCES", "alone", "deletions", "entry_of", "native_on_ptx", "ptx_of", "why_not"]

RESULTS: list[simt.Result] = []


def pytest_configure(config: Any) -> None:
    running = native_on_ptx(int(os.environ.get("SIMT_ARCH", "80")))
    global RESULTS
    RESULTS = running.__enter__()
    config.add_cleanup(lambda: running.__exit__(None, None, None))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    warps = sum(result.num_warp_instructions for result in RESULTS)
    terminalreporter.write_line(f"{len(RESULTS)} launches executed {warps} warp instructions")
