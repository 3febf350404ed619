"""`make gpu-check`: everything that only a GPU can say about the kernels, in one command.

Runs the tests that compare kernels with the reference on the GPU, times every op and whole training
steps with each backend, prints what share of the memory's bandwidth they reach, and writes the rows
to benchmarks/results/<machine>.jsonl, of which docs/benchmarks.md is made.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dinov2_fast import environment
from dinov2_fast.backends import BACKENDS, PREFERENCE
from dinov2_fast.errors import BackendUnavailable

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("tests", "ops", "steps")
# Backends that a whole step can take: every op has them.
STEP_BACKENDS = [
    name for name in BACKENDS if all(name in order["cuda"] for order in PREFERENCE.values())
]
# Architecture -> images of a step, which fit the eager reference into 40 GB.
STEPS = {"vits": 32, "vitl": 16}


@dataclass(frozen=True)
class Command:
    """One process of the check."""

    part: str
    words: tuple[str, ...]  # after the interpreter
    variables: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """As one would type it."""
        assigned = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*assigned, shlex.join(["python", *self.words])])


def commands(rows: Path, parts: Sequence[str] = PARTS) -> list[Command]:
    """What the check runs, in order.

    Args:
        rows: file of JSON lines to which measured rows are added.
        parts: of `PARTS`.
    """
    pytest = ("-m", "pytest", "-q")
    ops = ("-k", "cuda and not train_step", "--benchmark-only", "--rows", str(rows))
    planned = [
        Command("tests", (*pytest, "tests", "-m", "gpu")),
        Command("ops", (*pytest, "benchmarks", *ops)),
    ]
    for arch, batch_size in STEPS.items():
        words = ["-m", "dinov2_fast", "bench", "step", "--device", "cuda", "--arch", arch]
        words += ["--batch-size", str(batch_size), "--dtype", "bf16", "--steps", "5"]
        words += ["--append", str(rows)]
        planned += [
            Command("steps", tuple(words), {environment.PREFER.name: backend})
            for backend in STEP_BACKENDS
        ]
    return [command for command in planned if command.part in parts]


def main(arguments: list[str] | None = None) -> int:
    """Run the check; 1 when a command failed, 2 without a GPU.

    Args:
        arguments: words of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--only", action="append", choices=PARTS, help="default: every part")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.relative_to(ROOT)}/MACHINE")
    options = parser.parse_args(arguments)
    parts = options.only or PARTS
    if options.dry_run:
        print(*commands(Path("ROWS.jsonl"), parts), sep="\n")
        return 0
    if not torch.cuda.is_available():
        print(
            "gpu-check: torch sees no CUDA device, so there is nothing to measure; --dry-run "
            "(make gpu-check DRY_RUN=1) lists the commands",
            file=sys.stderr,
        )
        return BackendUnavailable.exit_code
    out = options.out or RESULTS / f"{machine_name(torch.cuda.get_device_name())}.jsonl"
    failed, rows = run_all(parts)
    print(summary(rows))
    if rows:
        write_rows(rows, out)
        print(f"wrote {out}; docs/benchmarks.md is made by")
        print("  dinov2-fast bench report benchmarks/results/*.jsonl --out docs/benchmarks.md")
    for command in failed:
        print(f"gpu-check: failed: {command}", file=sys.stderr)
    return 1 if failed else 0


def run_all(parts: Sequence[str]) -> tuple[list[Command], list[dict[str, Any]]]:
    """Run the commands of some parts; those that failed, and the rows measured.

    Args:
        parts: of `PARTS`.
    """
    failed: list[Command] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.touch()
        for command in commands(file, parts):
            print(f"gpu-check: {command}", flush=True)
            done = subprocess.run(
                [sys.executable, *command.words],
                cwd=ROOT,
                env=environment.extended(command.variables),
                check=False,
            )
            if done.returncode:
                failed.append(command)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    nominal = nominal_gb_s()
    for row in rows:
        if nominal and "gb_s" in row:
            row["nominal_gb_s"] = nominal
            row["share_of_nominal_bandwidth"] = row["gb_s"] / nominal
    return failed, rows


def machine_name(gpu: str) -> str:
    """A GPU's name as that of a file: h100-80gb-hbm3.

    Args:
        gpu: as the driver spells it.
    """
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-").removeprefix("nvidia-")


def nominal_gb_s() -> float:
    """Bandwidth of the GPU's memory by its clock and width; 0 where torch does not tell them."""
    properties = torch.cuda.get_device_properties()
    clock_khz = getattr(properties, "memory_clock_rate", 0)
    width_bits = getattr(properties, "memory_bus_width", 0)
    return 2 * clock_khz * width_bits / 8 / 1e6  # both edges of the clock carry data


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """What was measured, in lines for a person.

    Args:
        rows: of ops and steps.
    """
    lines: list[str] = []
    for row in rows:
        if "median_us" in row:
            nominal = row.get("share_of_nominal_bandwidth")
            lines.append(
                f"{row['op']:24} {row['mode']:18} {row['backend']:19} {row['dtype']:9} "
                f"{row['shape']!s:22} {row['median_us']:10.1f} us {row['gb_s']:7.0f} GB/s "
                f"{row['share_of_copy_bandwidth']:5.0%} of copy "
                + (f"{nominal:5.0%} of nominal" if nominal else "")
            )
        elif row.get("kind") == "step":
            lines.append(
                f"step {row['arch']} {row['dtype']}, {row['backend']}: "
                f"{row['seconds']['fast']:.3f} s, {row['speed_ratio']:.2f} times the eager "
                f"reference's speed, {row['peak_mib']['fast']:.0f} MiB, 1/{row['memory_ratio']:.1f}"
            )
    return "\n".join(lines)


def write_rows(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Put rows into a file, in place of those of the same kinds that it holds.

    Args:
        rows: of ops and steps.
        out: file of JSON lines.
    """
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    measured = {row.get("kind", "op") for row in rows}
    kept = [row for row in map(json.loads, lines) if row.get("kind", "op") not in measured]
    every = [*kept, *rows]
    out.write_text("".join(f"{json.dumps(row)}\n" for row in every), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
