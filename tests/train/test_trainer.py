"""Real runs of a few steps: what they write, how they resume, and how they end early."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov2_fast import backends, native
from dinov2_fast.config import Config, load_config
from dinov2_fast.errors import CheckpointError, ConfigError, DataError, NumericsError, OutputError
from dinov2_fast.models.pretrained import load_backbone
from dinov2_fast.train import tensor_file, trainer
from dinov2_fast.train.interruption import PreemptedError, StoppedByUserError
from dinov2_fast.train.trainer import train
from tests.train.runs import (
    command_words,
    result_of,
    snapshot,
    tiny_config,
    write_pictures,
)

LAST_STEP = 9


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    train(tiny_config(data), out)
    return out


@pytest.fixture
def config(data) -> Config:
    return tiny_config(data)


def stop_at(step: int, action) -> trainer.OnLog:
    """A callback that acts when a step is logged."""
    return lambda record: action() if record["step"] == step else None


def test_a_run_leaves_everything_it_promises(finished, config):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "teacher.safetensors",
    }
    records = result_of(finished)["metrics"]
    assert [record["step"] for record in records] == list(range(1, LAST_STEP + 1))
    for record in records:
        assert all(math.isfinite(value) for value in record.values())
        assert {"gradient_norm_backbone", "teacher_entropy", "target_mean_kl"} <= record.keys()
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["finished"], summary["steps"], summary["images"]) == (True, 9, 36)
    assert summary["final"]["loss"] == records[-1]["loss"]
    teacher = (finished / "teacher.safetensors").read_bytes()
    noted = {"sha256": hashlib.sha256(teacher).hexdigest(), "size": len(teacher)}
    assert summary["files"] == {"teacher.safetensors": noted}
    assert load_config(str(finished / "config.yaml")) == config
    assert sorted(os.listdir(finished / "checkpoints")) == [
        "step-00000004",
        "step-00000008",
        "step-00000009",
    ]


def test_a_run_without_the_extension_says_that_it_is_slow(tmp_path, config, capsys, monkeypatch):
    why = "the extension is not built; run `pip install .` in the project's folder"
    monkeypatch.setattr(native, "_load", lambda: (None, why))
    monkeypatch.setattr(backends, "_why_not", backends._why_not.__wrapped__)  # remembers no other
    train(config.updated({"run.stop_step": 1}), tmp_path)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "slow:" in line)
    assert why in line


def test_the_loss_falls(finished):
    losses = [record["loss"] for record in result_of(finished)["metrics"]]
    # The first step has learning rate 0, so the second sees the same networks.
    assert max(losses[-3:]) < min(losses[:2])


def test_the_teacher_and_the_checkpoint_load_as_a_backbone(finished):
    image = torch.randn(2, 3, 56, 56)
    teacher = load_backbone(finished / "teacher.safetensors")
    state = load_backbone(finished / "checkpoints" / "step-00000009" / "state.safetensors")
    assert torch.equal(teacher(image), state(image))


@pytest.mark.parametrize("stop_step", [1, 4, 7])
def test_a_run_stopped_at_a_step_and_continued_equals_one_that_was_not(
    tmp_path, config, finished, stop_step
):
    stopped = train(config.updated({"run.stop_step": stop_step}), tmp_path)
    assert stopped == {"finished": False, "steps": stop_step}
    assert not (tmp_path / "teacher.safetensors").exists()
    train(config, tmp_path)
    assert result_of(tmp_path) == result_of(finished)


def test_centres_and_untied_heads_are_part_of_a_checkpoint(tmp_path, config):
    head = {"num_prototypes": 32, "hidden_dim": 16, "bottleneck_dim": 8}
    config = config.updated(
        {
            "loss.centering": "softmax_centering",
            "loss.separate_ibot_head": True,
            "loss.ibot_head": head,
            "schedule.total_steps": 4,
        }
    )
    train(config, tmp_path / "whole")
    train(config.updated({"run.stop_step": 2}), tmp_path / "parts")
    train(config, tmp_path / "parts")
    assert result_of(tmp_path / "parts") == result_of(tmp_path / "whole")


def test_a_stopped_run_given_the_same_command_changes_nothing(tmp_path, config, capsys):
    config = config.updated({"run.stop_step": 2})
    train(config, tmp_path)
    before = snapshot(tmp_path)
    assert train(config, tmp_path) == {"finished": False, "steps": 2}
    assert snapshot(tmp_path) == before
    assert "stopped at step 2, as run.stop_step says" in capsys.readouterr().out


def test_a_finished_run_given_the_same_command_says_so_and_changes_nothing(
    finished, config, capsys
):
    before = snapshot(finished)
    summary = train(config, finished)
    assert snapshot(finished) == before
    assert summary == json.loads((finished / "summary.json").read_text())
    assert "finished at step 9; nothing to do" in capsys.readouterr().out


def test_other_numbers_of_workers_change_nothing(tmp_path, config, finished):
    train(config.updated({"run.stop_step": 5}), tmp_path)
    train(config.updated({"data.num_workers": 2, "run.log_every_steps": 1}), tmp_path)
    assert result_of(tmp_path) == result_of(finished)


def test_a_run_killed_between_checkpoints_repeats_the_lost_steps(tmp_path, config, finished):
    """The state of the directory after SIGKILL in step 7: lines of later steps, one cut short."""

    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path, on_log=stop_at(7, die))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    (tmp_path / "checkpoints" / ".tmp-step-00000007-0").mkdir()
    train(config, tmp_path)
    assert result_of(tmp_path) == result_of(finished)
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, config, finished, capsys):
    train(config.updated({"run.stop_step": 8}), tmp_path)
    file = tmp_path / "checkpoints" / "step-00000008" / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    train(config, tmp_path)
    shown = capsys.readouterr().out
    assert "step-00000008/state.safetensors was changed" in shown
    assert "going on from step 4 instead" in shown
    assert result_of(tmp_path) == result_of(finished)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, PreemptedError), (signal.SIGINT, StoppedByUserError)]
)
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    tmp_path, config, finished, number, error
):
    former = signal.getsignal(number)
    with pytest.raises(error, match="at step 6, which is saved"):
        train(config, tmp_path, on_log=stop_at(6, lambda: os.kill(os.getpid(), number)))
    assert signal.getsignal(number) is former
    assert (tmp_path / "checkpoints" / "step-00000006").is_dir()
    assert not (tmp_path / "run.lock").exists()
    train(config, tmp_path)
    assert result_of(tmp_path) == result_of(finished)


def test_sigterm_to_the_command_exits_75_and_the_same_command_ends_the_same_run(
    tmp_path, config, finished
):
    command = [sys.executable, "-m", "dinov2_fast", *command_words(config, tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = next(line for line in process.stdout if line.startswith("step "))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert first.startswith("step 1/9  loss ")
    assert (process.returncode, "Traceback" in errors) == (75, False), errors
    assert "stopped by SIGTERM at step" in errors
    train(config, tmp_path)
    assert result_of(tmp_path) == result_of(finished)


def test_a_second_run_into_the_same_directory_is_refused_and_the_first_goes_on(
    tmp_path, config, finished
):
    def try_again() -> None:
        with pytest.raises(OutputError, match="in use by process") as caught:
            train(config, tmp_path)
        assert caught.value.exit_code == 7

    train(config, tmp_path, on_log=stop_at(3, try_again))
    assert result_of(tmp_path) == result_of(finished)


def poison(monkeypatch, steps: set[int]) -> list[bool]:
    """Put a NaN into one crop at some steps; collects whether anything changed in those steps."""
    changed: list[bool] = []

    def step(session, batch):
        if session.step + 1 not in steps:
            return original(session, batch)
        crops = batch.global_crops.clone()
        crops[0, 0, 0, 0] = math.nan
        state = {**session.pair.state_dict(), **session.optimizer.state_dict()}
        before = {name: value.clone() for name, value in state.items()}
        result = original(session, dataclasses.replace(batch, global_crops=crops))
        changed.append(any(not torch.equal(before[name], state[name]) for name in state))
        return result

    original = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", step)
    return changed


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "softmax_centering"])
def test_a_broken_step_changes_nothing_and_is_written_down(
    tmp_path, config, monkeypatch, capsys, centering
):
    changed = poison(monkeypatch, {3, 4})
    train(config.updated({"loss.centering": centering}), tmp_path)
    assert changed == [False, False]
    records = result_of(tmp_path)["metrics"]
    assert [record["loss"] is None for record in records] == [
        step in (3, 4) for step in range(1, LAST_STEP + 1)
    ]
    assert records[-1]["nonfinite_steps"] == 2
    bundle = json.loads((tmp_path / "nonfinite" / "step-00000003.json").read_text())
    (process,) = bundle["processes"]
    assert len(process["sample_indices"]) == 4
    assert process["values"]["total"] is None
    assert "step 3 skipped, nothing changed: dino_global not finite" in capsys.readouterr().out


def test_too_many_broken_steps_in_a_row_end_the_run_with_code_4(tmp_path, config, monkeypatch):
    poison(monkeypatch, {2, 3, 5, 6, 7})
    with pytest.raises(NumericsError, match="3 broken steps in a row up to step 7") as caught:
        train(config, tmp_path)
    assert caught.value.exit_code == 4


def test_the_count_of_broken_steps_survives_a_restart(tmp_path, config, monkeypatch):
    poison(monkeypatch, {4, 5, 6})
    train(config.updated({"run.stop_step": 5}), tmp_path)
    with pytest.raises(NumericsError, match="3 broken steps in a row up to step 6"):
        train(config, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer.base_lr", 2e-3, r"optimizer\.base_lr: 0\.001 -> 0\.002"),
        ("model.depth", 3, r"model\.depth: None -> 3"),
        ("run.seed", 1, r"run\.seed: 0 -> 1"),
        ("run.batch_size", 2, r"global batch .*: 4 -> 2"),
        ("schedule.total_steps", 10, r"schedule\.total_steps: 9 -> 10"),
    ],
)
def test_settings_that_would_make_it_another_run_are_refused(tmp_path, config, key, value, words):
    train(config.updated({"run.stop_step": 1}), tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=words) as caught:
        train(config.updated({key: value}), tmp_path)
    assert caught.value.exit_code == 5
    assert "choose another --out" in str(caught.value)
    assert snapshot(tmp_path) == before


def test_a_finished_run_is_not_mistaken_for_one_with_other_settings(finished, config):
    with pytest.raises(CheckpointError, match=r"run\.seed: 0 -> 1"):
        train(config.updated({"run.seed": 1}), finished)
    with pytest.raises(CheckpointError, match="global batch: 4 -> 2"):
        train(config.updated({"run.batch_size": 2}), finished)


def test_the_same_images_elsewhere_are_fine_and_other_images_are_not(tmp_path, config, finished):
    train(config.updated({"run.stop_step": 4}), tmp_path / "out")
    more = write_pictures(tmp_path / "more", count=13)
    with pytest.raises(CheckpointError, match=r"images at data\.path: 12 -> 13"):
        train(config.updated({"data.path": str(more)}), tmp_path / "out")
    (more / "12.png").unlink()
    (more / "11.png").rename(more / "zz.png")
    with pytest.raises(CheckpointError, match=r"images at data\.path: 12 -> other names"):
        train(config.updated({"data.path": str(more)}), tmp_path / "out")
    (more / "zz.png").rename(more / "11.png")
    train(config.updated({"data.path": str(more)}), tmp_path / "out")
    assert result_of(tmp_path / "out") == result_of(finished)


def test_a_run_that_must_be_new_is_refused_where_one_began(tmp_path, config):
    train(config.updated({"run.stop_step": 1}), tmp_path)
    with pytest.raises(OutputError, match="holds a run already"):
        train(config, tmp_path, resume=False)


def test_a_full_disk_ends_the_run_with_code_7_and_it_resumes(
    tmp_path, config, finished, monkeypatch
):
    with monkeypatch.context() as patched:

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        fill = stop_at(7, lambda: patched.setattr(tensor_file.os, "fsync", full))
        with pytest.raises(OutputError, match="disk is full") as caught:
            train(config, tmp_path, on_log=fill)
        assert caught.value.exit_code == 7
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000004"]
    train(config, tmp_path)
    assert result_of(tmp_path) == result_of(finished)


def test_a_metrics_file_that_cannot_be_written_ends_the_run_with_code_7(tmp_path, config):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"metrics\.jsonl"):
        train(config, tmp_path)


def test_too_many_unreadable_images_end_the_run_with_code_3_after_saving(tmp_path, capsys):
    data = write_pictures(tmp_path / "pictures")
    for index in range(4):
        (data / f"{index:02d}.png").write_bytes(b"not a picture")
    config = tiny_config(data)
    with pytest.raises(DataError, match="unreadable") as caught:
        train(config, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert list((tmp_path / "out" / "checkpoints").glob("step-*/MANIFEST.json"))
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert all(json.loads(line)["path"].startswith(str(data)) for line in lines)
    # The way out that the message names works, and the run goes on from where it stopped.
    summary = train(config.updated({"data.max_bad_ratio": 1.0}), tmp_path / "out")
    assert (summary["steps"], summary["unreadable_images"]) == (9, 4)
    assert "4 unreadable images were replaced by others" in capsys.readouterr().out


def test_settings_that_make_no_network_or_crops_are_told_as_settings(tmp_path, config):
    for key, value in {"crops.global_px": 57, "model.num_heads": 3, "loss.ibot_weight": 0}.items():
        wrong = config.updated({key: value, "loss.dino_weight": 0 if "loss" in key else 1})
        with pytest.raises(ConfigError):
            train(wrong, tmp_path)


def test_a_log_line_is_written_every_so_many_steps_and_at_both_ends(tmp_path, config, capsys):
    seen: list[int] = []
    config = config.updated({"run.log_every_steps": 4})
    train(config, tmp_path, on_log=lambda record: seen.append(record["step"]))
    assert seen == [1, 4, 8, 9]
    assert [record["step"] for record in result_of(tmp_path)["metrics"]] == seen
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(shown) == 4


def test_bf16_runs_and_is_repeatable(tmp_path, config):
    config = config.updated({"run.precision": "bf16", "run.stop_step": 2})
    train(config, tmp_path / "a")
    train(config, tmp_path / "b")
    states = [tmp_path / name / "checkpoints/step-00000002/state.safetensors" for name in "ab"]
    assert states[0].read_bytes() == states[1].read_bytes()
