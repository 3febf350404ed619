from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from dinov2_fast.errors import OutputError
from dinov2_fast.train.run_directory import (
    RunDirectory,
    append_lines,
    output_errors,
    write_atomic,
)


def test_a_second_run_is_refused_and_told_who_holds_the_directory(tmp_path):
    with RunDirectory(tmp_path / "out").locked() as run:
        assert json.loads(run.lock.read_text())["pid"] == os.getpid()
        with (
            pytest.raises(OutputError, match=f"in use by process {os.getpid()}") as caught,
            RunDirectory(tmp_path / "out").locked(),
        ):
            pytest.fail("locked twice")
        assert caught.value.exit_code == 7
        assert run.lock.exists(), "the refused run must not remove the owner's lock"
    assert not run.lock.exists()


def dead_process_id() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("kind", ["dead", "reused", "rebooted", "garbage", "empty", "absurd"])
def test_a_stale_lock_is_taken_over(tmp_path, kind):
    run = RunDirectory(tmp_path)
    with run.locked():
        owner = json.loads(run.lock.read_text())
    changed = {
        "dead": {**owner, "pid": dead_process_id()},
        "reused": {**owner, "process_start": owner["process_start"] - 1},
        "rebooted": {**owner, "boot": "another"},
        "absurd": {**owner, "pid": 10**30},
    }
    run.lock.write_text(json.dumps(changed[kind]) if kind in changed else kind[:0] or "{")
    with run.locked():
        assert json.loads(run.lock.read_text())["token"] != owner["token"]


def test_a_lock_of_another_host_is_respected_and_the_way_out_told(tmp_path):
    run = RunDirectory(tmp_path)
    run.lock.write_text(json.dumps({"pid": 1, "host": "elsewhere.example"}))
    with pytest.raises(OutputError, match=r"elsewhere\.example.*delete .*run\.lock"), run.locked():
        pytest.fail("locked")


def test_a_zombie_holds_no_lock(tmp_path):
    run = RunDirectory(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with run.locked():
        owner = json.loads(run.lock.read_text())
    run.lock.write_text(json.dumps({**owner, "pid": process.pid}))
    with run.locked():
        pass
    process.wait()


def test_a_path_that_cannot_be_a_folder_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="choose another --out"), RunDirectory(path).locked():
            pytest.fail("locked")


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "permission"), (errno.EIO, "Input/output")],
)
def test_what_the_file_system_refuses_is_said_in_plain_words(tmp_path, code, words):
    with pytest.raises(OutputError, match=words), output_errors(tmp_path):
        raise OSError(code, os.strerror(code))


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_a_killed_write_left_is_swept_by_the_next_owner(tmp_path):
    for name in (".metrics.jsonl.0123abcd.tmp", ".mine.tmp", "notes.tmp"):
        (tmp_path / name).write_text("")
    with RunDirectory(tmp_path).locked():
        assert sorted(os.listdir(tmp_path)) == [".mine.tmp", "notes.tmp", "run.lock"]


def test_a_line_is_not_appended_to_one_that_was_cut_short(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": ')
    append_lines(path, [{"n": 2}, {"n": 3}])
    assert path.read_bytes() == b'{"n": 1}\n{"n": \n{"n": 2}\n{"n": 3}\n'


def test_a_summary_that_cannot_be_read_counts_as_none(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.read_summary() is None
    for text in ("", "[]", '{"a"'):
        run.summary.write_text(text)
        assert run.read_summary() is None
    run.summary.write_text('{"finished": true}')
    assert run.read_summary() == {"finished": True}
