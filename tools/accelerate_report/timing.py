"""Counted work -> modelled time on a GPU.

Launches follow each other and none costs anything by itself, so times are lower bounds. A matrix
product takes as long as its operations at `PRODUCT_SHARE` of the tensor cores' rate or its bytes at
`HBM_SHARE` of the memory's, whichever is longer; everything else but attention takes its bytes.
Attention takes the cycles of docs/cuda-kernels.md, counted for its kernel, at `ATTENTION_SHARE`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tools.accelerate_report.counting import Counted
from tools.kernel_report.flash_attention import HEAD_DIM
from tools.simt.report import Gpu

# What cuBLAS commonly reaches for bfloat16 products of some thousand rows, and copies of the HBM.
PRODUCT_SHARE, HBM_SHARE = 0.75, 0.85
# Modelled over published time of FlashAttention-2, see `tools.kernel_report.pipes`; taken for both.
ATTENTION_SHARE = 0.59

ORIGINAL_ATTENTION, OUR_ATTENTION = "FlashAttention-2", "ours"
TOKENS = 257  # of an image of 224 px: the length that attention was counted at

# (kernel, direction) -> cycles of an SM for one sequence and head.
AttentionCycles = Mapping[tuple[str, str], float]


def attention_cycles(page: str, gpu: Gpu) -> AttentionCycles:
    """Modelled cycles of both attention kernels for a sequence of `TOKENS`.

    Args:
        page: what `python -m tools.kernel_report` prints.
        gpu: whose row is read.
    Raises:
        ValueError: the page has no such row.
    """
    header = re.search(r"^\| GPU \| direction \| tokens \|.*$", page, re.MULTILINE)
    columns = _cells(header.group()) if header else []
    found: dict[tuple[str, str], float] = {}
    for direction in ("forward", "backward"):
        line = re.search(rf"^\| {gpu.name} \| {direction} \| {TOKENS} \|.*$", page, re.MULTILINE)
        if line is None:
            raise ValueError(
                f"attention_cycles: expected a row of {gpu.name}, {direction}, {TOKENS} tokens in "
                "the page; make it anew with python -m tools.kernel_report"
            )
        row = dict(zip(columns, _cells(line.group()), strict=True))
        for kernel in (ORIGINAL_ATTENTION, OUR_ATTENTION):
            cycles, _, _ = row[kernel].partition(" ")
            found[kernel, direction] = float(cycles.replace(",", ""))
    return found


def _cells(line: str) -> list[str]:
    """Cells of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def seconds(
    counted: Counted, gpu: Gpu, attention: AttentionCycles, kernel: str
) -> dict[str, float]:
    """Modelled time of a block's training step, part by part.

    Args:
        counted: its work.
        gpu: whose rates.
        attention: of `attention_cycles`.
        kernel: which of its kernels computes attention.
    """
    sm_hz = gpu.clock_ghz * 1e9 * gpu.num_sms
    flops_per_second = gpu.tensor_flops * sm_hz * PRODUCT_SHARE
    bytes_per_second = gpu.dram_gb_s * 1e9 * HBM_SHARE
    cycles = 0.0
    for direction, (sequences, heads, length, width) in counted.attention:
        assert (length, width) == (TOKENS, HEAD_DIM)
        cycles += sequences * heads * attention[kernel, direction]
    return {
        "products": sum(
            max(flops / flops_per_second, moved / bytes_per_second)
            for flops, moved in counted.products
        ),
        "attention": cycles / sm_hz / ATTENTION_SHARE,
        "the rest": counted.moved_bytes / bytes_per_second,
    }
