"""Prove the interpreter right and print the counts: `python -m tools.simt.selfcheck [--full]`.

1. arithmetic: expressions compiled by nvcc and by g++, bit for bit;
2. programs: Triton's kernels for sm_80 and sm_90 against NumPy, no fault reported;
3. planted: faults planted in kernels of ours, each reported;
4. deletions: every synchronisation of kernels of ours deleted, each reported;
5. mutants: deliberate errors in the interpreter, each found. Without --full every tenth;
and the speed is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from tools.simt.faults import Checks, Fault
from tools.simt.proofs import arithmetic, deletions, planted, triton_programs
from tools.simt.proofs.own_programs import OWN

KILLED_SHARE = 0.95  # of the mutants


def check_arithmetic(full: bool) -> dict[str, Any]:
    """Proof 1."""
    outcome = arithmetic.prove(32768 if full else 8192)
    return {
        "expressions": len(outcome.expressions),
        "inputs": outcome.num_inputs,
        "wrong": outcome.wrong,
    }


def check_programs(full: bool) -> dict[str, Any]:
    """Proof 2."""
    runs, wrong = 0, []
    for arch in (80, 90):
        programs = triton_programs.HOPPER_PROGRAMS if arch == 90 else triton_programs.PROGRAMS
        for name, (run, tolerance) in programs.items():
            for schedule in ("lockstep", 1) if full else ("lockstep",):
                runs += 1
                try:
                    error, _ = run(arch, schedule=schedule)
                    said = "" if error <= tolerance else f"error {error}"
                except Fault as fault:
                    said = str(fault)
                if said:
                    wrong.append(f"{name}, sm_{arch}, {schedule}: {said}")
    return {"runs": runs, "wrong": wrong}


def check_planted(full: bool) -> dict[str, Any]:
    """Proof 3."""
    schedules = ("lockstep", 1, 2) if full else ("lockstep",)
    runs, missed = 0, []
    for fault in planted.PLANTED:
        for schedule in schedules:
            runs += 1
            found = fault.report(schedule=schedule)
            if found is None or found.kind not in fault.kinds:
                missed.append(f"{fault.name}, {schedule}: {found}")
    return {"faults": len(planted.PLANTED), "runs": runs, "wrong": missed}


def check_deletions(full: bool) -> dict[str, Any]:
    """Proof 4."""
    outcomes = [outcome for program in OWN for outcome in deletions.delete_each(program)]
    missed = [f"{o.program}: {o.inst}" for o in outcomes if not o.reported]
    return {"deleted": len(outcomes), "wrong": missed}


def check_mutants(full: bool) -> dict[str, Any]:
    """Proof 5."""
    command = [sys.executable, "-m", "tools.simt.proofs.mutants"]
    command += [] if full else ["--every", "10", "--trusted"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"mutants": 0, "wrong": [done.stderr]}
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    survivors = [row for row in rows if not row["killed_by"]]
    killed = len(rows) - len(survivors)
    wrong = [] if killed >= KILLED_SHARE * len(rows) else [f"only {killed} of {len(rows)} found"]
    return {
        "mutants": len(rows),
        "killed": killed,
        "stopped": [row["number"] for row in rows if row["killed_by"].startswith("stopped")],
        "survivors": survivors,
        "wrong": wrong,
    }


def measure_speed(full: bool) -> dict[str, Any]:
    """Not a proof: million warp instructions a second of attention, median of five."""
    rates = {}
    for name, checks in (("unchecked", Checks.none()), ("all checks", Checks())):
        for arch in (80, 90):
            runs = []
            for _ in range(6):  # the first compiles
                begin = time.perf_counter()
                _, result = triton_programs.attention(arch, n=512, checks=checks)
                runs.append(result.num_warp_instructions / (time.perf_counter() - begin) / 1e6)
            rates[f"{name}, sm_{arch}"] = round(statistics.median(runs[1:]), 3)
    return {"million_warp_instructions_per_s": rates, "wrong": []}


CHECKS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "arithmetic": check_arithmetic,
    "programs": check_programs,
    "planted": check_planted,
    "deletions": check_deletions,
    "mutants": check_mutants,
    "speed": measure_speed,
}


def main() -> None:
    """Run the proofs; exit with 1 if one fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="more inputs, all orders, all mutants")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", choices=CHECKS, help="one proof")
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(CHECKS)
    outcomes = {}
    for name in names:
        outcomes[name] = CHECKS[name](arguments.full)
        if not arguments.json:
            said = {key: found for key, found in outcomes[name].items() if found or key != "wrong"}
            print(f"{name}: {said}", flush=True)
    if arguments.json:
        print(json.dumps(outcomes, indent=1))
    sys.exit(any(outcome["wrong"] for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
