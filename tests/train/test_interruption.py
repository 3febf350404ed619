from __future__ import annotations

import os
import signal
import threading

import pytest
from torch.utils.data import DataLoader

from dinov2_fast.data import loader
from dinov2_fast.train import interruption, trainer
from dinov2_fast.train.interruption import STOP_ERRORS, Interruption, PreemptedError
from tests.data.sources import Pictures
from tests.train.runs import tiny_config


@pytest.mark.parametrize("number", sorted(STOP_ERRORS))
def test_a_signal_is_remembered_and_the_former_handler_comes_back(number):
    former = signal.getsignal(number)
    with Interruption() as requested:
        assert requested.signal_number == 0
        os.kill(os.getpid(), number)
        assert requested.signal_number == number
    assert signal.getsignal(number) is former


def test_exit_codes_are_those_of_the_command_line():
    codes = {signal.Signals(number).name: error.exit_code for number, error in STOP_ERRORS.items()}
    assert codes == {"SIGTERM": 75, "SIGUSR1": 75, "SIGINT": 130}


def test_a_second_ctrl_c_leaves_at_once_but_not_the_same_one_passed_on(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    with Interruption():
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.1
        os.kill(os.getpid(), signal.SIGINT)  # the launcher's copy of a terminal's Ctrl-C
        now[0] += 1.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_changes_nothing():
    with Interruption() as requested:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert requested.signal_number == signal.SIGTERM


def test_outside_the_main_thread_no_handler_is_touched():
    before = {number: signal.getsignal(number) for number in STOP_ERRORS}
    inside: list[dict] = []

    def body() -> None:
        with Interruption():
            inside.append({number: signal.getsignal(number) for number in STOP_ERRORS})

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert inside == [before]


def test_a_signal_is_heard_while_storage_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "_POLL_S", 1)
    monkeypatch.setattr(trainer, "open_images", lambda _: Pictures(4, delay_s=100.0))
    config = tiny_config(tmp_path, data__num_workers=1)
    new_loader = loader.TrainingLoader._new_loader

    def and_signal(self: loader.TrainingLoader) -> DataLoader:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return new_loader(self)

    monkeypatch.setattr(loader.TrainingLoader, "_new_loader", and_signal)
    with pytest.raises(PreemptedError, match="at step 0, which is saved"):
        trainer.train(config, tmp_path / "run")
