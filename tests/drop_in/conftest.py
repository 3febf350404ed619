"""What tests of accelerated models share."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from dinov2_fast.drop_in.fast_block import FastBlock
from tests.drop_in.their_models import own_memory_at_any_size


@pytest.fixture
def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches take the path of large ones."""
    own_memory_at_any_size(monkeypatch)


@pytest.fixture
def halves_run(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The paths of the halves of every block that does not run as its library wrote it."""
    runs: list[Any] = []
    run_halves = FastBlock._run

    def noted(self: Any, halves: Any, paths: Any, *tokens: Any) -> Tensor:
        runs.append(tuple(paths))
        return run_halves(self, halves, paths, *tokens)

    monkeypatch.setattr(FastBlock, "_run", noted)
    return runs
