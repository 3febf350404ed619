"""Execute compiled PTX on the CPU, with checks that no GPU makes. See docs/simt.md."""

from __future__ import annotations

from tools.simt.bulk import TensorMap
from tools.simt.compile import compile_cu
from tools.simt.faults import Checks, Fault
from tools.simt.launch import Result, launch
from tools.simt.memory import Device, Output
from tools.simt.report import Report, report

__all__ = [
    "Checks",
    "Device",
    "Fault",
    "Output",
    "Report",
    "Result",
    "TensorMap",
    "compile_cu",
    "launch",
    "report",
]
