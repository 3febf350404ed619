"""Deliberate errors in the interpreter: a judge must find each.

`python -m tools.simt.proofs.mutants` prints one JSON line for every mutant.
"""

from __future__ import annotations

import argparse
import functools
import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIMT = Path(__file__).parents[1]
KEPT = {"tools.simt.compile", "tools.simt.proofs.mutants", "tools.simt.proofs.mutant_list"}
NOBODY = "nobody"
LIMIT_S = 120  # of a processor, which another load does not shorten; all judges take about 20


@dataclass(frozen=True)
class Mutant:
    """Text in a file of the interpreter that is replaced (its first occurrence after `after`)."""

    area: str
    file: str
    old: str
    new: str
    after: str = ""

    def source(self) -> str:
        """The file with the error in it."""
        text = (SIMT / self.file).read_text(encoding="utf-8")
        begin = text.index(self.after) if self.after else 0
        at = text.index(self.old, begin)
        return text[:at] + self.new + text[at + len(self.old) :]


class Patched(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports one module from changed text."""

    def __init__(self, module: str, source: str) -> None:
        self.module, self.source = module, source

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Only that module."""
        return importlib.util.spec_from_loader(name, self) if name == self.module else None

    def get_source(self, name: str) -> str:
        """The changed text."""
        return self.source

    def is_package(self, name: str) -> bool:
        """Mutants are plain modules."""
        return False


def kept_results() -> dict[str, Any]:
    """What need not be computed again for every mutant: PTX, and what g++ says."""
    from tools.simt import compile as nvcc
    from tools.simt.proofs import arithmetic, triton_programs

    nvcc.compile_cu = _hashable(nvcc.compile_cu)
    host = functools.cache(lambda count: arithmetic.from_host(arithmetic.inputs(count)))
    return {"host": host, "triton": triton_programs.compiled}


def _hashable(function: Any) -> Any:
    def call(path: Any, arch: str = "compute_80", flags: Any = ()) -> str:
        return function(path, arch, flags=flags)

    cached = functools.cache(call)
    return lambda path, arch="compute_80", *, flags=(), include=(): cached(path, arch, tuple(flags))


def load_with(mutant: Mutant | None, kept: dict[str, Any]) -> Any:
    """Import the interpreter again, with an error; returns the judges."""
    for name in list(sys.modules):
        ours = name.startswith("tools.simt") and name not in KEPT
        if ours or name.startswith("tests.tools.simt.test"):
            del sys.modules[name]
    if mutant:
        module = "tools.simt." + mutant.file.removesuffix(".py").replace("/", ".")
        sys.meta_path.insert(0, Patched(module, mutant.source()))
    from tools.simt.proofs import arithmetic, judges, triton_programs

    def recompiled(*args: Any, **options: Any) -> Any:
        return triton_programs.Compiled(**vars(kept["triton"](*args, **options)))

    triton_programs.compiled = recompiled
    arithmetic.from_host = lambda values: kept["host"](values.shape[1])
    return judges.judges()


def killer(mutant: Mutant | None, kept: dict[str, Any]) -> str:
    """The first judge that finds a mutant wrong, or ""."""
    try:
        for name, judge in load_with(mutant, kept):
            try:
                right = judge()
            except Exception as error:
                return f"{name} ({type(error).__name__})"
            if not right:
                return name
    except Exception as error:
        return f"import ({type(error).__name__})"
    return ""


def in_child(mutant: Mutant | None, kept: dict[str, Any], limit_s: int = LIMIT_S) -> str:
    """killer() in a process of its own, for it may hang."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
        try:
            os.write(writer, (killer(mutant, kept) or NOBODY).encode()[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    said = os.read(reader, 4096).decode()
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if not said:  # SIGXCPU for one that never ends
        return f"stopped by {signal.Signals(os.WTERMSIG(status)).name}"
    return "" if said == NOBODY else said


def main() -> None:
    """Try mutants one after another."""
    from tools.simt.proofs.mutant_list import MUTANTS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="only every n-th mutant")
    parser.add_argument("--only", type=int, help="one mutant, by number")
    parser.add_argument("--trusted", action="store_true", help="without judging the unchanged one")
    arguments = parser.parse_args()
    kept = kept_results()
    # In this process, so that what it compiles is there for every child.
    nobody = "" if arguments.trusted else killer(None, kept)
    if nobody:
        sys.exit(f"the interpreter itself is found wrong: {nobody}")
    chosen = list(enumerate(MUTANTS))[:: arguments.every]
    if arguments.only is not None:
        chosen = [(arguments.only, MUTANTS[arguments.only])]
    for number, mutant in chosen:
        found = in_child(mutant, kept)
        row = {"number": number, "area": mutant.area, "killed_by": found, "file": mutant.file}
        print(json.dumps({**row, "old": mutant.old, "new": mutant.new}), flush=True)


if __name__ == "__main__":
    main()
