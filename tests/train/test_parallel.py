"""Agreement between processes, and runs of two gloo processes under `torchrun`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dinov2_fast.errors import ConfigError, OutputError
from dinov2_fast.train.checkpoint import list_checkpoints, verify_checkpoint
from dinov2_fast.train.parallel import (
    Place,
    choose_device,
    distribute,
    joined,
    launched_processes,
    peer_stopped,
)
from tests.train.runs import SETTINGS, result_of, tiny_config, write_pictures


def test_alone_a_process_agrees_with_itself_and_wraps_nothing():
    place = Place(torch.device("cpu"))
    module = nn.Linear(2, 2)
    assert place.is_main
    assert place.agree(7) == 7
    assert place.gather("x") == ["x"]
    assert place.on_main(lambda: 3) == 3
    assert distribute(module, place) is module


def test_an_error_of_the_only_process_is_its_own():
    def fail() -> None:
        raise OutputError("full")

    with pytest.raises(OutputError, match="full"):
        Place(torch.device("cpu")).on_main(fail)


def test_a_process_that_follows_another_leaves_with_the_same_exit_code():
    error = peer_stopped("no images", 3)
    assert (error.exit_code, "no images" in str(error)) == (3, True)


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "mps", "cuda:x", ""])
def test_a_device_that_is_not_here_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=r"run\.device"):
        choose_device(name)


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", local_rank=3) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device("auto", local_rank=3) == torch.device("cuda", 3)
    assert choose_device("cuda:1", local_rank=3) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="start fewer processes"):
        choose_device("cuda", local_rank=4)


def test_a_world_size_without_a_rank_is_not_a_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert launched_processes() == 1
    monkeypatch.setenv("RANK", "0")
    assert launched_processes() == 4


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with joined("cpu", num_threads=3) as place:
        assert torch.get_num_threads() == 3
        assert (place.rank, place.world_size) == (0, 1)
    assert torch.get_num_threads() == before


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


def torchrun(
    data: Path, out: Path, *, processes: int = 2, kill: tuple[int, int] = (-1, -1), **overrides
) -> subprocess.Popen:
    settings = {**SETTINGS, "data.path": str(data), "run.batch_size": 4 // processes}
    settings |= {key.replace("__", "."): value for key, value in overrides.items()}
    script = Path(__file__).with_name("two_processes.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher += ["--max-restarts=1", "--monitor-interval=0.2"]
    arguments = [str(script), json.dumps(settings), str(out), *map(str, kill)]
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, output and errors of a launcher."""
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


def lines_of(folder: Path, rank: int) -> list[dict]:
    return [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()]


def test_two_processes_stay_equal_and_share_the_batches_of_one(data, tmp_path):
    code, output, errors = ended(torchrun(data, tmp_path / "out", schedule__total_steps=4))
    assert code == 0, errors
    first, second = (lines_of(tmp_path, rank) for rank in (0, 1))
    assert [line["hash"] for line in first] == [line["hash"] for line in second]
    assert len({line["hash"] for line in first}) == 4
    records = result_of(tmp_path / "out")["metrics"]
    assert all(value is not None for record in records for value in record.values())
    assert output.count("loss") == 4, "only one process speaks"
    # The same images as one process would take, half of them each.
    from dinov2_fast.data.sampler import sample_index

    drawn = [sample_index(0, position, 12) for position in range(16)]
    both = [
        index for a, b in zip(first, second, strict=True) for index in a["images"] + b["images"]
    ]
    assert both == drawn


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_the_run_ends_as_if_nothing_had_been(data, tmp_path):
    calm, killed = tmp_path / "calm" / "out", tmp_path / "killed" / "out"
    calm.parent.mkdir()
    killed.parent.mkdir()
    assert ended(torchrun(data, calm))[0] == 0
    code, output, errors = ended(torchrun(data, killed, kill=(1, 6)))
    assert code == 0, errors
    assert "resumed at step 4 of 9" in output
    assert result_of(killed) == result_of(calm)
    for folder in (calm.parent, killed.parent):
        last_hashes = {lines_of(folder, rank)[-1]["hash"] for rank in (0, 1)}
        assert len(last_hashes) == 1


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(data, tmp_path):
    out = tmp_path / "out"
    assert ended(torchrun(data, out, run__stop_step=4))[0] == 0
    # One process now, with twice the images: the same global batches.
    from dinov2_fast.train.trainer import train

    summary = train(tiny_config(data), out)
    assert (summary["steps"], summary["world_size"]) == (9, 1)


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_with_its_exit_code(data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").mkdir()
    code, _, errors = ended(torchrun(data, tmp_path / "out"))
    assert code != 0
    assert "metrics.jsonl" in errors
    assert "stopping because another process of the run stopped" in errors


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_once_for_all_processes(data, tmp_path):
    out = tmp_path / "out"
    process = torchrun(data, out, schedule__total_steps=10_000)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("step "))
    process.send_signal(signal.SIGTERM)
    _, _, errors = ended(process)
    (checkpoint,) = list_checkpoints(out / "checkpoints")
    step = verify_checkpoint(checkpoint)["step"]
    assert f"stopped by SIGTERM at step {step}, which is saved" in errors
    assert not (out / "run.lock").exists()
