"""`run.deterministic`: what a GPU is asked for; the CPU and callers are left alone."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.utils import deterministic

from dinov2_fast.train import trainer
from dinov2_fast.train.determinism import deterministic_algorithms
from tests.train.runs import tiny_config, write_pictures

GPU = torch.device("cuda", 0)


def asked_for() -> tuple[bool, bool, bool]:
    """Whether PyTorch has been asked for one order, only warns, and fills new memory."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,  # pyright: ignore
    )


def test_a_gpu_is_asked_and_the_callers_settings_come_back():
    before = asked_for()

    def stopped_run() -> None:
        with deterministic_algorithms(GPU, enabled=True):
            assert asked_for() == (True, True, False)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_run()

    assert asked_for() == before == (False, False, True)


def test_a_caller_who_wants_errors_keeps_them():
    torch.use_deterministic_algorithms(True)
    try:
        with deterministic_algorithms(GPU, enabled=True):
            assert asked_for() == (True, False, False)
        assert asked_for() == (True, False, True)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("kind", "enabled"), [("cpu", True), ("cuda", False)])
def test_nothing_is_asked_of_the_cpu_or_without_the_setting(kind, enabled):
    with deterministic_algorithms(torch.device(kind), enabled=enabled):
        assert asked_for() == (False, False, True)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_run_asks_as_its_setting_says(tmp_path, monkeypatch, enabled):
    seen: list[tuple[str, bool]] = []

    @contextmanager
    def remember(device: torch.device, *, enabled: bool):
        seen.append((device.type, enabled))
        yield

    monkeypatch.setattr(trainer, "deterministic_algorithms", remember)
    pictures = write_pictures(tmp_path / "pictures")
    config = tiny_config(pictures, run__deterministic=enabled, run__stop_step=1)

    trainer.train(config, tmp_path / "run")

    assert seen == [("cpu", enabled)]
