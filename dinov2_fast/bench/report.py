"""Measured rows as a page: Markdown tables, and bars against the reference as SVG."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dinov2_fast.errors import UserError
from dinov2_fast.report.plots import Bar, bar_chart

_OUR_BACKENDS, _BASELINES = ("native", "triton", "accelerated"), ("reference", "original")
_MODELS = {"vits14": "ViT-S", "vitb14": "ViT-B", "vitl14": "ViT-L", "vitg14": "ViT-g"}

# What tables and pictures read of a row.
_KEYS = frozenset(("device", "dtype", "threads", "hardware", "torch"))
_OP_KEYS = _KEYS | {"op", "backend", "mode", "shape", "median_us"}
_STEP_KEYS = _KEYS | {"arch", "prototypes", "batch_size", "seconds", "peak_mib"}
_STEP_KEYS |= {"speed_ratio", "speed_ratio_range", "memory_ratio", "memory_ratio_range"}
_STEP_KEYS |= {"saved_bytes_ratio", "arithmetic_ratio", "share_of_matmul"}

_SVG_STYLE = """<style>
text { font: 14px system-ui, sans-serif; fill: #1c1d21; } .track { fill: #e9e9e6; }
.bar { fill: #9aa0ab; } .emphasized { fill: #0b6e99; }
@media (prefers-color-scheme: dark) {
  text { fill: #e7e7e4; } .track { fill: #262a31; } .bar { fill: #6e7582; }
  .emphasized { fill: #58b7e0; }
}
</style>"""

_INTRODUCTION = """# Benchmarks against the eager reference

Every figure is a ratio of two medians that were measured side by side in one run. *Reference* is
the iBOT-style step in `benchmarks/eager/`: a forward pass for each resolution, attention weights
stored, masked drop path, heads on every token, softmax centering. *Tuned* is the same step with
glibc told to keep freed memory. Each contender runs in fresh processes, in turn; in brackets the
smallest and the largest ratio of a round. Memory is the growth of the process's peak over its
idle size (on a GPU, torch's allocator); *kept* is what the student's forward pass saves for the
backward pass. *Fewer operations* is how much less arithmetic the package's step has: what speed
goes beyond it comes from kernels and memory. *Of the machine* is the share of the speed of a
large matrix product, the faster of fp32 and the row's type, measured in the same run. *Of copy
bandwidth* is an op's share of the speed of a large copy; *of an equal copy*, of one that moves as
many bytes as the op, with caches flushed in the same way (why: `benchmarks/harness.py`). On a GPU
the package's step computes most ops with their PyTorch references until its kernels have been
measured there; `DINOV2_FAST_PREFER=native` (or `triton`) takes them. Pictures give prototypes in
units of 1024.
"""

_COMMANDS = """
```bash
dinov2-fast bench step --arch vits --prototypes 65536 --dtype fp32 --append ROWS.jsonl
pytest benchmarks --benchmark-only --rows ROWS.jsonl     # every op; --full for the large shapes
dinov2-fast bench report ROWS.jsonl --out PAGE.md
```
"""


class ReportError(UserError):
    """A file that holds no rows, or no folder to write into."""

    exit_code = 2


def read_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of `bench step --json`, of `--append`, or of pytest-benchmark's JSON.

    Args:
        paths: JSON or JSON-lines files.
    Returns:
        Step rows and op rows in the order of the files.
    Raises:
        ReportError: a file that cannot be read or holds something else, or a row that is not whole.
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            found = _parsed(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ReportError(f"bench: {path} cannot be read as JSON: {error}") from error
        usable = [row for row in found if isinstance(row, dict) and row.keys() & {"kind", "op"}]
        if not usable:
            raise ReportError(
                f"bench: {path} holds no rows; expected what `dinov2-fast bench step --json` prints"
            )
        for row in usable:
            needed = _STEP_KEYS if row.get("kind") == "step" else _OP_KEYS
            if missing := sorted(needed - row.keys()):
                raise ReportError(
                    f"bench: a row of {path} lacks {', '.join(missing)}; expected whole rows, as "
                    "`dinov2-fast bench step --append` and `pytest benchmarks --rows` write them"
                )
        rows += usable
    return rows


def write_report(rows: Sequence[dict[str, Any]], page: Path) -> list[Path]:
    """Write a page and its pictures beside it.

    Args:
        rows: of `read_rows`.
        page: the Markdown file; pictures take its name with -speed.svg and -memory.svg.
    Returns:
        The files written.
    Raises:
        ReportError: they cannot be written.
    """
    pictures = {
        page.with_name(f"{page.stem}-{name}.svg"): drawn for name, drawn in charts(rows).items()
    }
    files = {page: markdown(rows, pictures=[path.name for path in pictures]), **pictures}
    try:
        for path, content in files.items():
            path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"bench: cannot write {error.filename}: {error.strerror}") from error
    return list(files)


def markdown(rows: Sequence[dict[str, Any]], *, pictures: Sequence[str] = ()) -> str:
    """The page.

    Args:
        rows: of `read_rows`.
        pictures: file names shown above the tables.
    """
    parts = [_INTRODUCTION, _COMMANDS]
    parts += [f"\n![{Path(name).stem.rpartition('-')[2]} ratios]({name})\n" for name in pictures]
    steps = [row for row in rows if row.get("kind") == "step"]
    for machine in _distinct(_machine(row) for row in steps):
        parts.append(f"\n## Whole steps: {machine}\n\n")
        parts.append(_step_table([row for row in steps if _machine(row) == machine]))
    ops = [row for row in rows if "op" in row]
    for machine in _distinct(_machine(row) for row in ops):
        parts.append(f"\n## Ops: {machine}\n")
        here = [row for row in ops if _machine(row) == machine]
        for op in _distinct(row["op"] for row in here):
            parts.append(f"\n### {op}\n\n")
            parts.append(_op_table([row for row in here if row["op"] == op]))
    return "".join(parts)


def charts(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """SVG files by name: `speed` and `memory` against the reference; none without step rows.

    Args:
        rows: of `read_rows`.
    """
    steps = [row for row in rows if row.get("kind") == "step"]
    if not steps:
        return {}
    drawn: dict[str, str] = {}
    for name, key in (("speed", "speed_ratio"), ("memory", "memory_ratio")):
        bars = [Bar("reference", 1.0)]
        bars += [Bar(_label(row), row[key], emphasized=True) for row in steps]
        title = f"{name}: reference over the package's step"
        svg = bar_chart(title, bars, unit="x", highest=max(bar.value for bar in bars))
        opening, rest = svg.split(">", 1)
        width, height = opening.split('viewBox="0 0 ')[1].split('"')[0].split()
        size = f'width="{width}" height="{height}"'  # without it viewers fill the page
        opening = opening.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" {size} ', 1)
        drawn[name] = f"{opening}>{_SVG_STYLE}{rest}\n"
    return drawn


def headline(rows: Sequence[dict[str, Any]]) -> str:
    """The table of the README: the whole step, fewer columns.

    Args:
        rows: of `read_rows`.
    """
    cells = [
        [
            _machine(row),
            _label(row),
            f"**{row['speed_ratio']:.1f}x**",
            f"{row['speed_ratio_tuned']:.1f}x" if "speed_ratio_tuned" in row else "",
            f"1/{row['memory_ratio']:.1f}",
            f"1/{row['saved_bytes_ratio']:.1f}",
        ]
        for row in rows
        if row.get("kind") == "step"
    ]
    header = ["machine", "step", "speed", "against tuned", "peak memory", "kept for backward"]
    return _table(header, cells)


def _step_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["model", "K", "B", "dtype", "backend"]
    header += ["speed", "speed, tuned", "memory", "kept"]
    header += ["fewer operations", "of the machine: ours, reference", "s a step, MiB"]
    cells = [
        [
            _MODELS.get(row["arch"], row["arch"]),
            f"{row['prototypes']:,}",
            str(row["batch_size"]),
            row["dtype"],
            _asked_backend(row),
            _ranged(row, "speed_ratio"),
            _ranged(row, "speed_ratio_tuned"),
            _ranged(row, "memory_ratio"),
            f"{row['saved_bytes_ratio']:.2f}",
            f"{row['arithmetic_ratio']:.2f}",
            f"{row['share_of_matmul']['fast']:.0%}, {row['share_of_matmul']['reference']:.0%}",
            f"{row['seconds']['fast']:.3g}, {row['peak_mib']['fast']:.0f}",
        ]
        for row in rows
    ]
    return _table(header, cells)


def _op_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a shape, dtype and mode; medians in microseconds by backend."""
    backends = _distinct(row["backend"] for row in rows)
    header = ["shape", "dtype", "mode", *(f"{name}, us" for name in backends)]
    before = next((name for name in _BASELINES if name in backends), "reference")
    header += [f"{before} / ours", f"kept, {before} / ours"]
    header += ["of copy bandwidth", "of an equal copy", "TFLOP/s"]
    cells: list[list[str]] = []
    for key in _distinct((str(r["shape"]), r["dtype"], r["mode"]) for r in rows):
        same = [r for r in rows if (str(r["shape"]), r["dtype"], r["mode"]) == key]
        by_backend = {row["backend"]: row for row in same}
        ours = [by_backend[name] for name in _OUR_BACKENDS if name in by_backend]
        best = min(ours, key=lambda row: row["median_us"]) if ours else None
        baseline = by_backend.get(before)
        ratio, kept, share, equal, speed = "", "", "", "", ""
        if best is not None:
            if baseline is not None:
                ratio = f"{baseline['median_us'] / best['median_us']:.2f}"
                kept = _ratio_of_kept(baseline, best)
            share = f"{best['share_of_copy_bandwidth']:.0%}" if best.get("bytes") else ""
            equal = f"{best['share_of_equal_copy']:.0%}" if best.get("share_of_equal_copy") else ""
            speed = f"{best['tflop_s']:.3g}" if best.get("flops") else ""
        medians = [
            f"{by_backend[name]['median_us']:.0f}" if name in by_backend else ""
            for name in backends
        ]
        cells.append([key[0].strip("[]"), *key[1:], *medians, ratio, kept, share, equal, speed])
    return _table(header, cells)


def _ratio_of_kept(baseline: dict[str, Any], ours: dict[str, Any]) -> str:
    """How many times as much a baseline keeps for the backward pass, where rows say it."""
    kept = ours.get("saved_bytes")
    return f"{baseline['saved_bytes'] / kept:.2f}" if kept else ""


def _table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table without the columns in which no row has anything."""
    used = [i for i in range(len(header)) if not cells or any(row[i] for row in cells)]
    lines = [[header[i] for i in used], ["---"] * len(used)]
    lines += [[row[i] for i in used] for row in cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _parsed(text: str) -> list[Any]:
    """A JSON object, a list, pytest-benchmark's file, or JSON lines."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return _parsed_lines(text)
    if isinstance(whole, dict) and "benchmarks" in whole:
        return [each["extra_info"] for each in whole["benchmarks"]]
    return whole if isinstance(whole, list) else [whole]


def _parsed_lines(text: str) -> list[Any]:
    """JSON lines; an error tells the place in the whole text."""
    found: list[Any] = []
    begin = 0
    for line in text.splitlines(keepends=True):
        try:
            found += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise json.JSONDecodeError(error.msg, text, begin + error.pos) from None
        begin += len(line)
    return found


def _ranged(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return ""
    low, high = row[f"{key}_range"]
    spread = f" ({low:.2f} to {high:.2f})" if row.get("rounds") != 1 else ""
    return f"**{row[key]:.2f}**{spread}"


def _label(row: dict[str, Any]) -> str:
    model, device = _MODELS.get(row["arch"], row["arch"]), row["device"].replace("cuda", "gpu")
    label = f"{model} {row['dtype']} {row['prototypes'] / 1024:g}k {device.upper()}"
    return f"{label} {_asked_backend(row)}".rstrip()


def _asked_backend(row: dict[str, Any]) -> str:
    """The backend that a step was told to take; empty if none."""
    return row.get("backend", "auto").replace("auto", "")


def _machine(row: dict[str, Any]) -> str:
    """Processor, threads and torch of a row."""
    where = row["hardware"]
    if row.get("device") != "cuda":
        where += f", {row['threads']} thread{'' if str(row['threads']) == '1' else 's'}"
    return f"{where}, torch {row['torch'].partition('+')[0]}"


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
