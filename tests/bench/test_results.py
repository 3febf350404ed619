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


# What a row of an op is not complete without.
TIMES = ("median_us", "quartiles_us", "rounds", "warmup_rounds", "peak_mib")
REACHED = ("gb_s", "share_of_copy_bandwidth", "tflop_s")


def test_every_row_says_what_it_was_measured_on():
    for row in rows():
        for key in ("hardware", "torch", "commit", "device", "dtype", "driver"):
            assert row[key], (key, row)


def test_every_row_of_an_op_is_complete():
    of_ops = [row for row in rows() if "op" in row]
    assert of_ops
    for row in of_ops:
        for key in ("backend", "shape", "mode", "caches", "threads", *TIMES):
            assert row[key], (key, row)
        low, high = row["quartiles_us"]
        assert low <= row["median_us"] <= high
        assert all(row[key] >= 0 for key in REACHED)
        assert any(row[key] > 0 for key in REACHED)


def test_a_table_of_ops_compares_with_its_baseline():
    shared = {"op": "accelerate", "dtype": "float32", "shape": [2, 4], "mode": "training"}
    shared |= {"hardware": "CPU", "torch": "2", "threads": 1, "device": "cpu", "commit": "0"}
    contenders = [
        {"backend": "original", "median_us": 300.0, "saved_bytes": 50},
        {"backend": "accelerated", "median_us": 200.0, "saved_bytes": 20},
    ]

    page = markdown([shared | each for each in contenders], pictures=[])

    assert "| original / ours | kept, original / ours |" in page
    assert "| 2, 4 | float32 | training | 300 | 200 | 1.50 | 2.50 |" in page
