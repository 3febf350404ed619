from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from dinov2_fast.config import CropConfig, DataConfig, MaskConfig
from dinov2_fast.data import loader as loader_module
from dinov2_fast.data.collate import Batch
from dinov2_fast.data.datasets import open_images
from dinov2_fast.data.loader import StopRequested, TrainingLoader, default_num_workers
from dinov2_fast.errors import DataError, LoaderError
from tests.data.pictures import write_folder
from tests.data.sources import Buggy, Greedy, Pictures, ThreadCounting

ROOT = Path(__file__).parents[2]


def make(source, *, num_workers=0, max_bad_ratio=0.001, **changes):
    settings = {
        "crops": CropConfig(global_px=14, local_px=7, num_local=2),
        "masks": MaskConfig(),
        "patch_size": 7,
        "seed": 11,
        "batch_size": 4,
        "data": DataConfig(num_workers=num_workers, max_bad_ratio=max_bad_ratio),
    }
    return TrainingLoader(source, **{**settings, **changes})


def assert_equal(first: Batch, second: Batch) -> None:
    for field in dataclasses.fields(Batch):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def batches_of(loader, number):
    batches = list(islice(loader, number))
    loader.close()
    return batches


@pytest.fixture(scope="module")
def reference():
    """Steps 0..9 built in this process."""
    return batches_of(make(Pictures(10)), 10)


@pytest.fixture
def fast_poll(monkeypatch):
    """Dead workers are noticed within a second."""
    monkeypatch.setattr(loader_module, "_POLL_S", 1)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("start_step", [0, 3])
def test_batches_are_the_same_for_any_worker_count_and_after_any_restart(
    reference, num_workers, start_step
):
    loader = make(Pictures(10), num_workers=num_workers, start_step=start_step)
    for expected, got in zip(reference[start_step:], batches_of(loader, 7), strict=False):
        assert_equal(expected, got)
    assert loader.next_step == start_step + 7


def test_steps_go_on_without_end_or_to_the_stop_step(reference):
    assert [batch.step for batch in islice(make(Pictures(10)), 10)] == list(range(10))
    stopped = make(Pictures(10), start_step=4, stop_step=6)
    assert [batch.step for batch in stopped] == [4, 5]
    assert list(stopped) == []


def test_a_second_iteration_goes_on_where_the_first_stopped(reference):
    loader = make(Pictures(10))
    next(iter(loader))
    assert_equal(reference[1], next(iter(loader)))
    loader.close()
    assert_equal(reference[2], next(iter(loader)))


def workers_of(loader):
    return [worker.pid for worker in loader._workers()]


def test_a_killed_worker_is_replaced_and_no_batch_is_lost(reference, fast_poll):
    loader = make(Pictures(10), num_workers=2)
    batches = iter(loader)
    got = [next(batches)]
    first = workers_of(loader)
    os.kill(first[1], signal.SIGKILL)
    got += list(islice(batches, 7))
    second = workers_of(loader)
    loader.close()
    for expected, batch in zip(reference, got, strict=False):
        assert_equal(expected, batch)
    assert not set(first) & set(second)


@pytest.mark.parametrize("while_building", [True, False])
def test_a_frozen_worker_is_replaced_after_the_timeout(reference, fast_poll, while_building):
    # Frozen while building it announces nothing; frozen later, it keeps what it announced.
    loader = make(Pictures(10, delay_s=0.2 if while_building else 0.0), num_workers=1)
    batches = iter(loader)
    next(batches)
    while not while_building and loader._batches._worker_result_queue.empty():
        pass
    loader._watchdog._timeout_s = 2.0  # after the workers have started, however long that took
    hung = workers_of(loader)
    os.kill(hung[0], signal.SIGSTOP)
    started = time.monotonic()
    got = list(islice(batches, 2))
    seconds = time.monotonic() - started
    loader.close()
    for expected, batch in zip(reference[1:], got, strict=False):
        assert_equal(expected, batch)
    assert seconds < 2.0 + 10
    with pytest.raises(ProcessLookupError):
        os.kill(hung[0], 0)


def test_a_lock_that_a_killed_worker_held_is_not_waited_for(reference, fast_poll):
    loader = make(Pictures(10, delay_s=0.2), num_workers=1)
    batches = iter(loader)
    next(batches)
    loader._batches._workers_done_event._event._cond.acquire()  # as the worker would have
    os.kill(workers_of(loader)[0], signal.SIGKILL)
    for expected, batch in zip(reference[1:], list(islice(batches, 4)), strict=False):
        assert_equal(expected, batch)
    loader.close()


def test_workers_that_keep_dying_end_the_run_with_advice(fast_poll):
    loader = make(Pictures(10, delay_s=0.05), num_workers=1)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
        os.kill(workers_of(loader)[0], signal.SIGKILL)
    with pytest.raises(LoaderError, match=r"4 times within an hour.*--data\.num-workers"):
        list(batches)
    loader.close()


def test_a_want_of_shared_memory_ends_the_run_at_once_with_advice():
    loader = make(Greedy(10), num_workers=1, timeout_s=1000.0)
    with pytest.raises(LoaderError, match=r"/dev/shm.*--data\.num-workers 0"):
        next(iter(loader))


def test_a_request_to_stop_is_heard_while_workers_hang(fast_poll):
    asked = []
    loader = make(
        Pictures(10, delay_s=100.0),
        num_workers=1,
        timeout_s=1000.0,
        stop_requested=lambda: asked.append(loader._workers()) or len(asked) == 2,
    )
    with pytest.raises(StopRequested):
        next(iter(loader))
    for worker in asked[0]:  # killed, so that the end of training does not wait for them either
        worker.join(timeout=10)
        assert worker.exitcode == -signal.SIGKILL


def test_a_batch_lost_on_its_way_is_fetched_again(reference):
    loader = make(Pictures(10), num_workers=1)
    batches = iter(loader)
    got = [next(batches)]
    next(loader._batches)  # as when pinning its memory had failed
    got += list(islice(batches, 3))
    loader.close()
    for expected, batch in zip(reference, got, strict=False):
        assert_equal(expected, batch)


def test_slow_batches_are_not_mistaken_for_dead_workers(fast_poll):
    loader = make(Pictures(10, delay_s=0.35), num_workers=1)
    batches = iter(loader)
    next(batches)
    worker = workers_of(loader)
    assert next(batches).step == 1
    assert workers_of(loader) == worker
    loader.close()


def test_ctrl_c_reaches_the_training_process_only(reference):
    loader = make(Pictures(10), num_workers=1)
    batches = iter(loader)
    next(batches)
    worker = workers_of(loader)
    os.kill(worker[0], signal.SIGINT)
    for expected, got in zip(reference[1:], islice(batches, 6), strict=False):
        assert_equal(expected, got)
    assert workers_of(loader) == worker
    loader.close()


def test_closing_ends_the_workers():
    loader = make(Pictures(10), num_workers=2)
    next(iter(loader))
    workers = workers_of(loader)
    loader.close()
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_end_when_the_training_process_is_killed():
    script = """
import time
from tests.data.test_loader import make, workers_of
from tests.data.sources import Pictures
if __name__ == "__main__":
    loader = make(Pictures(10), num_workers=2)
    next(iter(loader))
    print(*workers_of(loader), flush=True)
    time.sleep(300)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline, "orphaned workers"


def test_workers_use_one_thread():
    loader = make(ThreadCounting(4), num_workers=1, max_bad_ratio=1.0)
    reasons = {item.reason for batch in islice(loader, 2) for item in batch.unreadable}
    loader.close()
    assert reasons == {"1 threads"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_images_are_quarantined_and_too_many_end_the_run(tmp_path, num_workers):
    source = open_images(write_folder(tmp_path / "images", 8))
    path = tmp_path / "quarantine.jsonl"
    (tmp_path / "images" / "003.png").write_bytes(b"")
    loader = make(source, num_workers=num_workers, quarantine_path=path)
    batches_of(loader, 6)  # 24 draws: three passes over eight images
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["index"], line["reason"]) for line in lines] == [(3, "empty file")]
    assert lines[0]["step"] in (0, 1)
    assert len(loader.quarantine) == 1

    (tmp_path / "images" / "005.png").write_bytes(b"")
    resumed = make(source, num_workers=num_workers, quarantine_path=path, start_step=6)
    with pytest.raises(DataError, match="2 unreadable images"):
        batches_of(resumed, 6)
    resumed.close()
    assert {json.loads(line)["index"] for line in path.read_text().splitlines()} == {3, 5}


def test_substitutes_are_the_same_for_any_worker_count(tmp_path):
    source = open_images(write_folder(tmp_path, 9))
    for index in (1, 4):
        (tmp_path / f"{index:03}.png").write_bytes(b"broken")
    one, two = (batches_of(make(source, num_workers=n, max_bad_ratio=1.0), 5) for n in (0, 2))
    for a, b in zip(one, two, strict=True):
        assert_equal(a, b)
    assert any(batch.unreadable for batch in one)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_workers_arrive_as_themselves(tmp_path, num_workers):
    source = open_images(write_folder(tmp_path, 2))
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    loader = make(source, num_workers=num_workers)
    with pytest.raises(DataError, match="all unreadable") as error:
        next(iter(loader))
    assert "Traceback" not in str(error.value)
    loader = make(Buggy(4), num_workers=num_workers)
    with pytest.raises(RuntimeError, match="building a batch failed") as error:
        next(iter(loader))
    assert "a bug in reading image" in str(error.value)


def test_waiting_is_measured():
    loader = make(Pictures(10, delay_s=0.02))
    next(iter(loader))
    assert loader.wait_s >= 0.08  # four images of 20 ms
    waited = loader.wait_s
    time.sleep(0.05)
    assert loader.wait_s == waited


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_global_random_state_is_left_alone(num_workers):
    loader = make(Pictures(10), num_workers=num_workers)
    before = torch.get_rng_state()
    batches_of(loader, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("cores", "local_world_size", "workers"),
    [(1, 1, 0), (2, 1, 1), (8, 1, 7), (64, 1, 16), (16, 8, 1), (4, 8, 0)],
)
def test_minus_one_takes_the_cores_that_training_leaves(
    monkeypatch, cores, local_world_size, workers
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert default_num_workers(local_world_size) == workers
    loader = make(
        Pictures(2), num_workers=-1, world_size=local_world_size, local_world_size=local_world_size
    )
    assert loader.num_workers == workers


def test_ranks_draw_disjoint_parts_of_a_pass():
    drawn = []
    for rank in range(2):
        loader = make(Pictures(16), rank=rank, world_size=2)
        drawn += torch.cat([batch.sample_indices for batch in islice(loader, 2)]).tolist()
    assert sorted(drawn) == list(range(16))
