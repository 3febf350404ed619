"""The command line as a person meets it: help, exit codes, and messages without tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dinov2_fast import cli
from dinov2_fast.errors import BackendUnavailable, ConfigError, NumericsError


def test_python_dash_m_and_the_console_script_are_the_same_program():
    from importlib.metadata import entry_points

    import dinov2_fast.__main__ as module

    scripts = [e for e in entry_points(group="console_scripts") if e.name == "dinov2-fast"]
    if not scripts:
        pytest.skip("dinov2_fast is on the path but not installed, so there is no console script")
    (script,) = scripts
    assert script.value == "dinov2_fast.__main__:main"
    assert script.load() is module.main
    done = subprocess.run(
        [sys.executable, "-m", "dinov2_fast", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("dinov2_fast ")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["eval", "knn", "--help"]])
def test_help_is_printed_and_exits_0(words, capsys):
    assert cli.run(words) == 0
    assert "usage: dinov2-fast" in capsys.readouterr().out


def test_training_reuses_freed_memory_from_its_start_on(monkeypatch):
    from dinov2_fast import demo
    from dinov2_fast.train import memory, trainer

    called: list[str] = []
    monkeypatch.setattr(memory, "reuse_freed_memory", lambda: called.append("reuse"))
    monkeypatch.setattr(trainer, "train", lambda *_: called.append("train"))
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: called.append("demo"))

    cli.run(["train", "debug", "--data", "x", "--out", "y"])
    cli.run(["demo", "--out", "y"])

    assert called == ["reuse", "train", "reuse", "demo"]


def test_settings_lists_every_setting_with_its_meaning(capsys):
    assert cli.run(["train", "vitl14", "--settings"]) == 0
    text = capsys.readouterr().out
    assert "--optimizer.base-lr" in text
    assert "Peak learning rate" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "required: VERB"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "vits41", "--data", "x", "--out", "y"], "did you mean vits14?"),
        (["train", "debug", "--data", "x", "--out", "y", "--model.dpeth", "3"], "--model.depth"),
        (["train", "debug", "--stepz=3"], "unknown option --stepz (did you mean --steps?)"),
        (["train", "debug", "--optimizer.base_lrr", "3"], "did you mean --optimizer.base-lr?"),
        (["train", "debug", "--dry-run", "--crops.local-px", "30"], "crops.local_px must be"),
        (["train", "debug", "--dry-run", "--crops.global-px", "57"], "use 56 or 70"),
        (["train", "debug", "--data.num-workers", "-2"], "data.num_workers must be at least -1"),
        (["eval", "knn", "run"], "--data DIR"),
        (
            ["train", "debug", "--data", "x", "--out", "y", "--batch-size", "0"],
            "run.batch_size must be",
        ),
        (["train", "debug", "--out", "y"], "add --data PATH"),
        (["train", "debug", "--data", "x"], "add --out OUT"),
        (["train", "debug", "--data", "x", "--out", ""], "expected a folder, got an empty name"),
        (["doctor", "--jsn"], "unrecognized arguments: --jsn"),
        (["convert", "a.pth", "b.pth"], "--to"),
    ],
)
def test_usage_mistakes_exit_2_and_name_the_way_out(words, expected, capsys):
    assert cli.run(words) == 2
    captured = capsys.readouterr()
    assert expected in captured.err + captured.out
    assert "Traceback" not in captured.err + captured.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--loss.separate-ibot-head"], "true"),
        (["--loss.separate-ibot-head", "True"], "true"),
        (["--loss.separate_ibot_head=true"], "true"),
        (["--loss.separate-ibot-head", "false"], "false"),
        (["--loss.no-separate-ibot-head"], "false"),
    ],
)
def test_a_switch_takes_a_value_like_any_other_setting(words, expected, capsys):
    assert cli.run(["train", "debug", "--dry-run", *words, "--optimizer.base_lr=2e-4"]) == 0
    text = capsys.readouterr().out
    assert f"separate_ibot_head: {expected}" in text
    assert "base_lr: 0.0002" in text


def test_running_out_of_the_cpus_memory_exits_6(capsys, monkeypatch):
    def fail(options, rest):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr(cli, "_doctor", fail)
    assert cli.run(["doctor"]) == 6
    assert "error: out of memory: " in capsys.readouterr().err


def test_a_missing_data_folder_exits_3(tmp_path, capsys):
    words = ["train", "debug", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    assert cli.run(words) == 3
    assert "nowhere" in capsys.readouterr().err


def test_missing_weights_exit_5(tmp_path, capsys):
    words = ["convert", str(tmp_path / "no.pth"), str(tmp_path / "o.safetensors"), "--to", "timm"]
    assert cli.run(words) == 5
    assert "no.pth" in capsys.readouterr().err


def test_dry_run_prints_settings_parameters_and_steps(capsys):
    assert cli.run(["train", "vitg14", "--dry-run", "--steps", "1000"]) == 0
    text = capsys.readouterr().out
    assert "total_steps: 1000" in text
    # The published 1,136,480,768 at 518 px, less the 1113 positions of 1536 that 224 px lacks.
    assert "1,134,771,200" in text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no"), 2),
        (BackendUnavailable("no"), 2),
        (NumericsError("no"), 4),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_exit_codes_without_tracebacks(error, code, monkeypatch, capsys):
    def fail(options, rest):
        raise error

    monkeypatch.setattr(cli, "_doctor", fail)
    assert cli.run(["doctor"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_an_unexpected_error_exits_1_and_keeps_the_traceback_in_a_file(monkeypatch, capsys):
    def fail(options, rest):
        raise RuntimeError("the sky fell")

    monkeypatch.setattr(cli, "_doctor", fail)
    assert cli.run(["doctor"]) == 1
    message = capsys.readouterr().err
    assert "the sky fell" in message
    path = message.rsplit(" ", 1)[1].strip()
    with open(path, encoding="utf-8") as file:
        assert "Traceback" in file.read()


def test_doctor_json_is_one_object(capsys):
    assert cli.run(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"]
