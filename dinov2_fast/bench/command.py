"""The words of `dinov2-fast bench`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def add_bench(verbs: Any) -> None:
    """Add `bench step` and `bench report` to the command line.

    Args:
        verbs: what `add_subparsers` gave.
    """
    bench = verbs.add_parser("bench", help="measure whole steps against an eager reference")
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="KIND")
    step = kinds.add_parser(
        "step",
        help="speed and memory of a training step, interleaved in fresh processes",
        description="Runs the eager iBOT-style reference (on the CPU also with a tuned allocator) "
        "and the package's step in turn, each in fresh processes, and prints ratios of medians.",
    )
    step.add_argument("--arch", default="vits", help="vits, vitb, vitl, vitg or debug")
    step.add_argument("--prototypes", type=int, default=65536, help="K (default 65536)")
    step.add_argument("--batch-size", type=int, default=5, help="images (default 5)")
    step.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the networks")
    step.add_argument(
        "--drop-ratio", type=float, default=0.4, help="of residual branches (default 0.4)"
    )
    step.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs")
    step.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    step.add_argument("--steps", type=int, default=2, help="timed steps of a process (default 2)")
    step.add_argument(
        "--rounds", type=int, default=3, help="processes of each contender (default 3)"
    )
    step.add_argument("--json", action="store_true", help="print one JSON object")
    step.add_argument(
        "--append", type=Path, metavar="FILE", help="add the row to a file of JSON lines"
    )
    step.set_defaults(action=_step)
    report = kinds.add_parser("report", help="tables and pictures out of measured rows")
    report.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON or JSON lines")
    report.add_argument(
        "--out", type=Path, metavar="PAGE", help="Markdown file (default: the first FILE as .md)"
    )
    report.set_defaults(action=_report)


def _step(options: argparse.Namespace, rest: list[str]) -> int:
    from dinov2_fast.bench.setting import StepSetting
    from dinov2_fast.bench.step import compare_steps, summary
    from dinov2_fast.errors import ConfigError, OutputError

    if options.rounds < 1:
        raise ConfigError(f"bench: --rounds must be at least 1, got {options.rounds}")
    if options.append is not None and not options.append.parent.is_dir():
        raise ConfigError(f"bench: no folder {options.append.parent} to write --append into")
    if options.append is not None:
        try:  # before minutes of measuring rather than after them
            options.append.open("a", encoding="utf-8").close()
        except OSError as error:
            raise OutputError(
                f"bench: cannot write --append {options.append}: {error.strerror}"
            ) from error
    names = ("arch", "prototypes", "batch_size", "dtype", "drop_ratio", "device", "steps")
    values = {name: getattr(options, name) for name in names}
    if options.threads is not None:
        values["threads"] = options.threads
    row = compare_steps(
        StepSetting(**values),
        rounds=options.rounds,
        on_measured=lambda line: print(line, file=sys.stderr),
    )
    line = json.dumps(row)
    print(line if options.json else summary(row))
    if options.append is not None:
        with options.append.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    return 0


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    from dinov2_fast.bench.report import ReportError, read_rows, write_report

    page = options.out or options.files[0].with_suffix(".md")
    if page in options.files:
        raise ReportError(f"bench: the page would overwrite its rows, {page}; choose another --out")
    for path in write_report(read_rows(options.files), page):
        print(path)
    return 0
