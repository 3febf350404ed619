"""`python -m tools.kernel_report`: compile, execute and count every CUDA kernel of ours."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from typing import Any

import torch

from tools.kernel_report import attention_cases, flash_attention, loss_cases, row_cases
from tools.kernel_report.kernels import ARCHS, Instance, execute, instances, stems
from tools.kernel_report.page import page
from tools.kernel_report.pipes import GPUS, Work
from tools.simt.native_launch import SOURCES, ptx_of, why_not

CASES = {**row_cases.CASES, **attention_cases.CASES, **loss_cases.CASES}


def main(arguments: list[str] | None = None) -> int:
    """Print the report; 1 when an instance was not executed, 2 when there is nothing to report.

    Args:
        arguments: words of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_report", description=__doc__)
    parser.add_argument("--json", action="store_true", help="every instance as JSON")
    parser.add_argument("--stem", action="append", choices=stems(), help="file of csrc/cuda; all")
    parser.add_argument("--arch", action="append", type=int, choices=ARCHS, help="default: both")
    parser.add_argument("--static", action="store_true", help="compile, execute nothing")
    options = parser.parse_args(arguments)
    reason = why_not()
    if reason:
        print(f"kernel_report: {reason}", file=sys.stderr)
        return 2
    report, problems = made(
        options.stem or stems(), tuple(options.arch or ARCHS), static=options.static
    )
    print(json.dumps(report, indent=1) if options.json else page(report), end="")
    for problem in problems:
        print(f"kernel_report: {problem}", file=sys.stderr)
    return 1 if problems else 0


def made(
    chosen: list[str], archs: tuple[int, ...], *, static: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """The report as JSON, and what is wrong.

    Args:
        chosen: stems.
        archs: 80, 90.
        static: compile only; an instance that was not executed is then no problem.
    """
    found = instances(chosen, archs)
    if not static:
        for arch in archs:
            for stem in chosen:
                execute([i for i in found if i.stem == stem], CASES.get(stem, []), arch)
    problems: list[str] = []
    for instance in found:
        where = f"{instance.name} of {instance.stem}, sm_{instance.arch}"
        if not static and not instance.executed:
            problems.append(f"not executed: {where}")
        for each in instance.executions:
            wrong = [key for key, e in each.errors.items() if not math.isfinite(e["error"])]
            problems += [f"not finite: {key} by {where}, {each.case.shape}" for key in wrong]
    first = ptx_of(SOURCES[0], archs[0])
    release = re.search(r"Cuda compilation tools, release ([\d.]+)", first)
    report = {
        "compiler": f"nvcc {release.group(1) if release else 'unknown'}",
        "kernels": [instance.row() for instance in found],
        "attention": beside_flash_attention(found),
    }
    return report, problems


def beside_flash_attention(found: list[Instance]) -> list[dict[str, Any]]:
    """Rows of `flash_attention.compare`: sm_80 on the A100, sm_90 on the H100.

    Args:
        found: instances; of attention's, executed ones count.
    """
    rows: list[dict[str, Any]] = []
    names = {lengths: name for name, lengths in flash_attention.CASES.items()}
    for arch, gpu in zip(ARCHS, GPUS, strict=True):
        ours: dict[tuple[str, str], list[Work]] = defaultdict(list)
        for instance in found:
            for each in instance.executions:
                counts = instance.stem == "attention" and instance.arch == arch
                if counts and each.case.types == (torch.bfloat16,) and each.case.sizes in names:
                    ours[each.call, names[each.case.sizes]].append(each.work)
        rows += flash_attention.compare(ours, gpu)
    return rows


if __name__ == "__main__":
    sys.exit(main())
