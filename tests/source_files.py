"""The project's source files and what they import, for the tests that read sources."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dinov2_fast"


def python_files(*folders: str) -> list[Path]:
    """Python files of folders below the root, kernels and eager reference under their own name."""
    links = (PACKAGE / "kernels", PACKAGE / "bench" / "eager")
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if not any(link in path.parents for link in links) and "__pycache__" not in path.parts
    )


def cpp_files() -> list[Path]:
    suffixes = {".cpp", ".hpp", ".h", ".cu", ".cuh"}
    return sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes)


PACKAGE_FILES = python_files("dinov2_fast", "kernels")
ALL_PYTHON_FILES = [*PACKAGE_FILES, *python_files("tests", "benchmarks", "tools", "examples")]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(path: Path, line: int | None = None) -> str:
    name = path.relative_to(ROOT).as_posix()
    return name if line is None else f"{name}:{line}"


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, literal `import_module` calls included."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for constant in [a for a in node.args if isinstance(a, ast.Constant)]:
                yield node.lineno, str(constant.value)


def calls_of(path: Path, function: str) -> Iterator[ast.Call]:
    """Calls whose dotted name is `function`."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == function:
            yield node


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
