"""The published tables are those of the measured rows that lie in the repository."""

from __future__ import annotations

from pathlib import Path

from dinov2_fast.bench.report import charts, headline, markdown, read_rows

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
WAY_OUT = "dinov2-fast bench report benchmarks/results/*.jsonl --out docs/benchmarks.md"


def rows() -> list[dict]:
    return read_rows(sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")))


def test_the_page_is_generated():
    pictures = charts(rows())
    names = [f"benchmarks-{name}.svg" for name in pictures]
    assert PAGE.read_text(encoding="utf-8") == markdown(rows(), pictures=names), WAY_OUT
    for name, drawn in zip(names, pictures.values(), strict=True):
        assert (PAGE.parent / name).read_text(encoding="utf-8") == drawn, WAY_OUT


def test_the_readme_shows_the_measured_ratios():
    assert headline(rows()) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_row_says_what_it_was_measured_on():
    for row in rows():
        for key in ("hardware", "torch", "commit", "device", "dtype"):
            assert row[key], (key, row)
