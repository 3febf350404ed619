"""House rules that a reader of the sources can check: lengths, names, safety, docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.source_files import (
    ALL_PYTHON_FILES,
    PACKAGE,
    PACKAGE_FILES,
    ROOT,
    calls_of,
    cpp_files,
    functions_of,
    imports_of,
    parsed,
    place,
)

MAX_FILE_LINES = 400
MAX_CPP_FILE_LINES = 500
MAX_FILE_LINES_OF = {"dinov2_fast/train/trainer.py": 300}
MAX_FUNCTION_LINES = 80  # without the docstring
MAX_KERNEL_LINES = 150
MAX_COLUMNS = 100
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common", "tools"}

# Variables of torchrun, which are not ours: read where processes are set up, nowhere else.
FOREIGN_ENVIRONMENT_READERS = {"dinov2_fast/train/parallel.py"}


def test_files_keep_to_their_length():
    violations: list[str] = []
    programs = sorted((ROOT / "tests/tools/simt/programs").iterdir())
    for path in [*ALL_PYTHON_FILES, *cpp_files(), *(p for p in programs if p.suffix != ".py")]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        budget = MAX_FILE_LINES if path.suffix == ".py" else MAX_CPP_FILE_LINES
        budget = MAX_FILE_LINES_OF.get(place(path), budget)
        if lines > budget:
            violations.append(f"{place(path)}: {lines} lines, allowed {budget}")
    assert not violations, "\n".join(violations)


def test_functions_keep_to_their_length():
    violations: list[str] = []
    for path in ALL_PYTHON_FILES:
        budget = MAX_KERNEL_LINES if ROOT / "kernels" in path.parents else MAX_FUNCTION_LINES
        for function in functions_of(path):
            lines = code_lines(function)
            if lines > budget:
                violations.append(
                    f"{place(path, function.lineno)}: {function.name} has {lines} lines, "
                    f"allowed {budget}"
                )
    for path in cpp_files():
        for line, name, lines in cpp_functions(path.read_text(encoding="utf-8")):
            kernel = name.startswith("__global__")  # its name may stand on the next line
            budget = MAX_KERNEL_LINES if kernel else MAX_FUNCTION_LINES
            if lines > budget:
                violations.append(f"{place(path, line)}: {lines} lines, allowed {budget}")
    assert not violations, "\n".join(violations)


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def cpp_functions(text: str) -> Iterator[tuple[int, str, int]]:
    """(line, signature's first line, lines) of the functions of clang-formatted code.

    A function ends with a line that is "}" alone and begins with the last unindented line before
    it that opens a parenthesis.
    """
    begin, signature = 0, ""
    for number, line in enumerate(text.splitlines(), start=1):
        if re.match(r"[A-Za-z_].*\(", line):
            begin, signature = number, line
        elif line == "}" and begin:
            yield begin, signature, number - begin + 1
            begin = 0


def test_length_of_cpp_functions_is_measured():
    text = (
        "int a;\nvoid f(int x,\n       int y) {\n  g(x);\n}\n\nnamespace {\nvoid h() {\n}\n}  // n"
    )
    assert [(line, lines) for line, _, lines in cpp_functions(text)] == [(2, 4), (8, 2)]


def test_lines_keep_to_their_width():
    # Python's are ruff's business.
    violations = [
        place(path, number)
        for path in cpp_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > MAX_COLUMNS
    ]
    assert not violations, "\n".join(violations)


# Lists of instruction sets, and of the optimizer's tensors and their pieces: none grows with rows.
LISTS_ON_THE_CPU = {"attention.cpp", "level.hpp", "optimizer.cpp"}


def cpu_code() -> Iterator[tuple[Path, str]]:
    """The CPU's kernels without comments and texts."""
    for path in cpp_files():
        if path.parent == ROOT / "csrc/cpu":
            yield path, re.sub(r'//.*|"[^"]*"', "", path.read_text(encoding="utf-8"))


def test_cpu_kernels_allocate_nothing():
    allocates = r"\b\w*alloc\w*\(|\bnew\b|\bmake_(unique|shared)\b"
    violations = [
        f"{place(path)}: {found.group()}"
        for path, code in cpu_code()
        for found in re.finditer(
            allocates if path.name in LISTS_ON_THE_CPU else rf"{allocates}|std::vector", code
        )
    ]
    assert not violations, "\n".join(violations)


def test_one_file_starts_the_threads_of_the_cpu():
    # A forked child must not start a team, and who asks for one thread gets none: parallel.hpp.
    starting = re.compile(r"omp parallel|std::(thread|async)|pthread")
    assert [path.name for path, code in cpu_code() if starting.search(code)] == ["parallel.hpp"]


def test_file_names_say_what_is_inside():
    violations = [
        place(path)
        for path in [*ALL_PYTHON_FILES, *cpp_files()]
        if path.stem.strip("_") in VAGUE_NAMES
    ]
    assert not violations, "\n".join(violations)


def test_environment_variables_are_read_in_one_place_and_never_written():
    pattern = re.compile(r"\bos\.(environb?|getenv|putenv|unsetenv)\b|from os import .*env")
    writes = re.compile(
        r"environ\[[^\]]*\]\s*=[^=]|environ\.(setdefault|update|pop|clear)|putenv|del os\.environ"
    )
    violations: list[str] = []
    for path in PACKAGE_FILES:
        code = ast.unparse(without_docstrings(path))
        reads_allowed = path == PACKAGE / "environment.py" or (
            place(path) in FOREIGN_ENVIRONMENT_READERS and "DINOV2_FAST" not in code
        )
        if pattern.search(code) and not reads_allowed:
            violations.append(f"{place(path)}: reads the environment; use environment.py")
        if writes.search(code):
            violations.append(f"{place(path)}: writes the environment")
    assert not violations, "\n".join(violations)


def without_docstrings(path: Path) -> ast.Module:
    """The file's tree without strings that stand alone."""

    class Remover(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.AST:
            constant = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            return ast.copy_location(ast.Pass(), node) if constant else node

    return Remover().visit(ast.parse(path.read_text(encoding="utf-8")))


# Function -> the keyword that keeps it from running code found in a file, and its value.
SAFE_LOADING = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}


@pytest.mark.parametrize("function", SAFE_LOADING)
def test_loading_a_file_never_runs_code_from_it(function: str):
    keyword, value = SAFE_LOADING[function]
    safe = ast.dump(ast.keyword(keyword, ast.Constant(value)))
    violations = [
        f"{place(path, call.lineno)}: {function} without {keyword}={value}"
        for path in ALL_PYTHON_FILES
        for call in calls_of(path, function)
        if safe not in map(ast.dump, call.keywords)
    ]
    assert not violations, "\n".join(violations)


def test_the_package_unpickles_nothing_and_reads_yaml_safely():
    forbidden = {"pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.full_load"}
    forbidden |= {"yaml.unsafe_load", "eval", "exec", "os.system", "np.fromfile"}
    violations = [
        f"{place(path, call.lineno)}: {function}"
        for path in PACKAGE_FILES
        for function in forbidden
        for call in calls_of(path, function)
    ]
    assert not violations, "\n".join(violations)


def test_everything_public_has_a_docstring():
    violations: list[str] = []
    for path in PACKAGE_FILES:
        tree = parsed(path)
        if ast.get_docstring(tree) is None:
            violations.append(f"{place(path)}: the file")
        classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
        for owner in [tree, *(c for c in classes if not c.name.startswith("_"))]:
            for node in owner.body:
                if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    continue
                # The implementation documents its overloads.
                overload = any(ast.unparse(d).endswith("overload") for d in node.decorator_list)
                public = not node.name.startswith("_") and not overload
                if public and ast.get_docstring(node) is None:
                    violations.append(f"{place(path, node.lineno)}: {node.name}")
    assert not violations, "\n".join(violations)


def test_every_file_postpones_its_annotations():
    violations = [
        place(path)
        for path in ALL_PYTHON_FILES
        if any(not isinstance(n, ast.Expr) for n in parsed(path).body)
        and "annotations" not in {name.split(".")[-1] for _, name in imports_of(path)}
    ]
    assert not violations, "\n".join(violations)
