"""What tests of accelerated models share."""

from __future__ import annotations

import pytest

from tests.drop_in.their_models import own_memory_at_any_size


@pytest.fixture
def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches take the path of large ones."""
    own_memory_at_any_size(monkeypatch)
