"""What an interpreter must get right, cheapest first: they find what is wrong with a mutant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from tools.simt.proofs import arithmetic, deletions, planted, triton_programs
from tools.simt.proofs.own_programs import OWN

Judge = tuple[str, Callable[[], bool]]
LONG = {"matmul", "matmul of float16", "matmul in tf32"}  # in random order


def judges(num_inputs: int = 2048) -> Iterator[Judge]:
    """(name, says whether all is right); a fault is as wrong as a wrong result."""
    for program in OWN:
        yield f"ours: {program.name}", lambda p=program: p.run(p.ptx())[0] <= p.tolerance
    yield "arithmetic", lambda: not arithmetic.prove(num_inputs).wrong
    for arch in (90, 80):
        for name, (run, tolerance) in triton_programs.HOPPER_PROGRAMS.items():
            if arch == 90 or name in triton_programs.PROGRAMS:
                label = f"Triton sm_{arch}: {name}"
                yield label, lambda r=run, a=arch, t=tolerance: r(a)[0] <= t
    yield from _instructions()
    for fault in planted.PLANTED:
        yield f"planted: {fault.name}", lambda f=fault: _named(f.report(), f)
    for program in OWN:
        label = f"random: {program.name}"
        yield label, lambda p=program: p.run(p.ptx(), schedule=1)[0] <= p.tolerance
    for program in OWN:
        label = f"deletions: {program.name}"
        yield label, lambda p=program: all(o.reported for o in deletions.delete_each(p))
    for name, (run, tolerance) in triton_programs.PROGRAMS.items():
        if name not in LONG:
            yield f"random: {name}", lambda r=run, t=tolerance: r(80, schedule=1)[0] <= t


def _named(fault: Any, expected: planted.Planted) -> bool:
    return fault is not None and fault.kind in expected.kinds


def _instructions() -> Iterator[Judge]:
    """The tests of single instructions, with every combination of their parameters."""
    from tests.tools.simt import test_instructions as module
    from tools.simt.compile import compile_cu

    def passes(test: Callable[..., None], arguments: dict[str, Any]) -> bool:
        if "ptx" in inspect.signature(test).parameters:
            source = module.PROGRAMS / "instructions.cu"
            arguments = {"ptx": compile_cu(source, "compute_90a"), **arguments}
        test(**arguments)
        return True

    for name, test in vars(module).items():
        if name.startswith("test_"):
            for case in _cases(test):
                yield f"{name} {case}", lambda t=test, c=case: passes(t, c)


def _cases(test: Any) -> list[dict[str, Any]]:
    """The combinations that pytest's parametrize marks mean."""
    cases: list[dict[str, Any]] = [{}]
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, rows = mark.args
            several = not isinstance(names, str)
            chosen = [
                dict(zip(names, row, strict=True)) if several else {names: row} for row in rows
            ]
            cases = [{**case, **more} for case in cases for more in chosen]
    return cases
