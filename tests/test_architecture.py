"""Who may import whom, and the one stem of every op, as docs/architecture.md draws them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from dinov2_fast.backends import PREFERENCE
from tests.source_files import (
    ALL_PYTHON_FILES,
    PACKAGE,
    PACKAGE_FILES,
    ROOT,
    cpp_files,
    functions_of,
    imports_of,
    parsed,
    place,
    python_files,
)

STEMS = {
    "attention",
    "stochastic_depth",
    "layer_norm",
    "swiglu",
    "gelu",
    "sinkhorn",
    "cross_entropy",
    "koleo",
    "optimizer",
}

LEAVES = {
    "backends",
    "config",
    "distributed",
    "environment",
    "errors",
    "flash_attention",
    "manifest",
    "native",
    "packing",
}

# Room -> rooms it may import besides itself. A room is a folder or a file of dinov2_fast/.
MAY_IMPORT = {
    **dict.fromkeys(LEAVES, LEAVES),
    "kernels": LEAVES,
    "ops": LEAVES | {"kernels"},
    "nn": LEAVES | {"ops"},
    "models": LEAVES | {"ops", "nn"},
    "drop_in": LEAVES | {"ops", "nn"},
    "losses": LEAVES | {"ops"},
    "data": LEAVES,
    "features": LEAVES | {"models", "data"},
    "evaluation": LEAVES | {"features", "models", "ops", "data"},
    "report": LEAVES | {"evaluation", "features", "models", "data"},
    "curation": LEAVES | {"evaluation", "features", "models", "ops", "data"},
    "train": LEAVES | {"models", "losses", "nn", "ops", "data", "features", "evaluation"},
}

# Rooms for people rather than for other rooms: they may import everything, and only each other
# may import them.
ENTRANCES = {"__init__", "__main__", "bench", "cli", "demo", "doctor", "self_test"}

# Beyond the standard library, what leaves may import.
LEAF_LIBRARIES = {"numpy", "torch", "yaml"}


def room_of(path: Path) -> str:
    """The room a file stands in: the first folder, or the file's own name."""
    if ROOT / "kernels" in path.parents:
        return "kernels"
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def rooms_imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of our own."""
    for line, name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "dinov2_fast" and parts[1:] and parts[1] not in {"__version__", "_native"}:
            yield line, parts[1]


def test_every_file_of_the_package_stands_in_a_room_of_the_table():
    rooms = {room_of(path): place(path) for path in PACKAGE_FILES}
    assert not {r: p for r, p in rooms.items() if r not in MAY_IMPORT and r not in ENTRANCES}


def test_rooms_import_only_what_the_table_allows():
    violations = [
        f"{place(path, line)}: {room} imports {imported}"
        for path in PACKAGE_FILES
        for room in [room_of(path)]
        if room not in ENTRANCES
        for line, imported in rooms_imported(path)
        if imported != room and imported not in MAY_IMPORT[room]
    ]
    assert not violations, "\n".join(violations)


def test_the_table_is_a_hierarchy():
    # Leaves may know each other; everything else must not go round in a circle.
    upper = {room: allowed - LEAVES for room, allowed in MAY_IMPORT.items() if room not in LEAVES}
    while upper:
        ground = {room for room, allowed in upper.items() if not allowed & upper.keys()}
        assert ground, f"rooms that import each other in a circle: {sorted(upper)}"
        upper = {room: allowed for room, allowed in upper.items() if room not in ground}


def test_leaves_import_torch_and_the_standard_library_only():
    allowed = LEAF_LIBRARIES | {"dinov2_fast"} | sys.stdlib_module_names
    violations = [
        f"{place(path, line)}: {name}"
        for path in PACKAGE_FILES
        if room_of(path) in LEAVES
        for line, name in imports_of(path)
        if name.split(".")[0] not in allowed
    ]
    assert not violations, "\n".join(violations)


def test_imports_are_absolute():
    violations = [
        place(path, node.lineno)
        for path in ALL_PYTHON_FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not violations, "\n".join(violations)


def test_kernels_are_imported_inside_functions_and_by_their_package_name():
    violations: list[str] = []
    for path in ALL_PYTHON_FILES:
        inside = {n for f in functions_of(path) for n in ast.walk(f)}
        for node in ast.walk(parsed(path)):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if any(name.split(".")[0] == "kernels" for name in names[:1]):
                violations.append(f"{place(path, node.lineno)}: import dinov2_fast.kernels")
            ours = any(name.startswith("dinov2_fast.kernels") for name in names)
            if ours and room_or_none(path) == "ops" and node not in inside:
                violations.append(f"{place(path, node.lineno)}: not inside a function")
    assert not violations, "\n".join(violations)


def room_or_none(path: Path) -> str | None:
    return room_of(path) if path in PACKAGE_FILES else None


def test_every_op_has_its_files_under_one_stem():
    ops = {p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_")}
    tests = {p.stem.removeprefix("test_") for p in (ROOT / "tests/ops").glob("test_*.py")}
    # A part of an op in a file of its own carries the stem in front: cross_entropy_prototypes.
    parts = {stem for stem in ops if any(stem.startswith(f"{whole}_") for whole in STEMS)}
    assert ops - parts == STEMS
    assert tests >= ops
    assert {stem for stem in tests - ops if not stem.startswith(tuple(STEMS))} == set()
    assert set(PREFERENCE) == STEMS


def test_kernels_and_native_sources_stand_under_a_stem():
    kernels = [p for p in python_files("kernels") if p.stem not in {"__init__", "launches"}]
    sources = [
        p for p in cpp_files() if p.parent.name in {"cpu", "cuda"} and p.suffix in {".cpp", ".cu"}
    ]
    violations = [
        place(path)
        for path in [*kernels, *sources]
        if not any(path.stem == stem or path.stem.startswith(f"{stem}_") for stem in STEMS)
    ]
    assert not violations, "\n".join(violations)


def test_a_preferred_native_kernel_has_its_source():
    suffixes = {"cpu": "cpp", "cuda": "cu"}
    missing = [
        f"csrc/{device}/{op}.{suffixes[device]}"
        for op, devices in PREFERENCE.items()
        for device, backends in devices.items()
        if "native" in backends
        and not (ROOT / "csrc" / device / f"{op}.{suffixes[device]}").is_file()
    ]
    assert not missing


def test_every_op_file_begins_with_its_reference():
    violations: list[str] = []
    for stem in STEMS:
        path = PACKAGE / "ops" / f"{stem}.py"
        public = [n.name for n in parsed(path).body if isinstance(n, ast.FunctionDef)]
        if not public[0].endswith("_reference"):
            violations.append(f"{place(path)}: begins with {public[0]}")
    assert not violations, "\n".join(violations)
