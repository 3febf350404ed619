"""The page of Triton's kernels, which nobody wrote by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dinov2_fast.ops._attention_triton import MAX_HEAD_DIM
from tools.triton_report.calls import CALLS, HEADS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "triton-kernels.md").read_text()


def lines_of(stem: str) -> list[list[str]]:
    """The cells of every line of a stem's tables."""
    sections = re.findall(rf"^## {stem}\b[^\n]*\n\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    lines = [line for section in sections for line in section.splitlines()[2:] if line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("stem", [call.__name__ for call in CALLS])
def test_the_page_has_every_kernel_and_none_that_spills(stem: str):
    code = (ROOT / "kernels" / f"{stem}.py").read_text()
    kernels = set(re.findall(r"^def _?(\w+)_kernel\(", code, re.M))
    lines = lines_of(stem)
    assert {kernel for kernel, *_ in lines} == kernels
    for kernel, sizes, _, registers, spills, shared, _ in lines:
        largest = [max(map(int, cell.split(" / "))) for cell in (registers, spills, shared)]
        assert largest[0] <= 255, f"{kernel}, {sizes}"
        assert largest[1] <= 16, f"{kernel}, {sizes}"
        assert largest[2] <= 99 * 1024, f"{kernel}, {sizes}"


def test_the_page_has_every_head_dimension():
    told = {int(re.findall(r"\bD (\d+)", sizes)[0]) for _, sizes, *_ in lines_of("attention")}
    assert told == {head_dim for head_dim, _ in HEADS}
    assert max(told) == MAX_HEAD_DIM
