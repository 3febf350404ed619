"""Options: `--full` runs large shapes too, `--rows FILE` keeps what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="large shapes too, and the reference compiled in bf16"
    )
    parser.addoption(
        "--rows", type=Path, metavar="FILE", help="add every row to a file of JSON lines"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    for item in items:
        if item.get_closest_marker("full") or _compiles_in_bfloat16(item):
            item.add_marker(pytest.mark.skip(reason="--full"))


def _compiles_in_bfloat16(item: pytest.Item) -> bool:
    """Whether a row compiles the reference once more; that takes longer than the row."""
    given = getattr(item, "callspec", None)
    values = [] if given is None else given.params.values()
    return "compiled reference" in values and torch.bfloat16 in values


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the rows measured, those of `dinov2-fast bench report`."""
    file: Path | None = session.config.getoption("--rows")
    measured: Any = getattr(session.config, "_benchmarksession", None)
    if file is None or measured is None:
        return
    rows = [each.extra_info for each in measured.benchmarks if each.extra_info]
    with file.open("a", encoding="utf-8") as out:
        out.writelines(f"{json.dumps(row)}\n" for row in rows)
