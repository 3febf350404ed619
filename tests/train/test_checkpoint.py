from __future__ import annotations

import builtins
import errno
import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from dinov2_fast.config import Config, to_dict
from dinov2_fast.errors import CheckpointError, OutputError
from dinov2_fast.manifest import sealed
from dinov2_fast.train import checkpoint, run_directory, tensor_file
from dinov2_fast.train.checkpoint import (
    config_hash,
    differing_keys,
    list_checkpoints,
    load_newest,
    prune,
    read_checkpoint,
    save_checkpoint,
    sweep,
    verify_checkpoint,
)

FACTS = {"seed": 0, "world_size": 1, "config_sha256": "0" * 64, "versions": {"torch": "2"}}


class Killed(BaseException):
    """What a SIGKILL does to the code that follows it: nothing of it runs."""


def state_of(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "pair": {"student.weight": torch.randn(17, 3, generator=generator)},
        "optimizer": {"exp_avg": [torch.randn(4, generator=generator)], "steps": step},
        "run": {"seconds": 1.5, "name": "tiny", "nothing": None},
    }


def save(folder: Path, step: int, keep: int = 3) -> Path:
    return save_checkpoint(folder, state_of(step), step=step, facts=FACTS, keep=keep)


def assert_is_state_of(step: int, state: dict) -> None:
    expected = state_of(step)
    assert torch.equal(state["pair"]["student.weight"], expected["pair"]["student.weight"])
    assert torch.equal(state["optimizer"]["exp_avg"][0], expected["optimizer"]["exp_avg"][0])
    assert state["optimizer"]["steps"] == step
    assert state["run"] == expected["run"]


def no_warning(text: str) -> None:
    pytest.fail(f"unexpected warning: {text}")


def test_what_was_saved_is_loaded(tmp_path):
    path = save(tmp_path, 7)
    loaded = load_newest(tmp_path, warn=no_warning)
    assert loaded is not None
    assert (loaded.step, loaded.path, loaded.manifest["facts"]) == (7, path, FACTS)
    assert_is_state_of(7, loaded.state)
    assert sorted(os.listdir(tmp_path)) == ["step-00000007"]


def test_no_folder_and_no_checkpoint_load_as_none(tmp_path):
    assert load_newest(tmp_path / "missing", warn=no_warning) is None
    assert load_newest(tmp_path, warn=no_warning) is None


def test_a_tensor_under_two_names_is_stored_once(tmp_path):
    weight = torch.ones(1000)
    state = {"a": weight, "b": weight, "row": weight[:10], "scalar": torch.tensor(3.0)}
    path = save_checkpoint(tmp_path, state, step=1, facts=FACTS, keep=1)
    assert (path / "state.safetensors").stat().st_size < 4 * 1000 + 1000
    loaded = read_checkpoint(path).state
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def kill_at(monkeypatch, n: int, *, before: bool) -> list[str]:
    """Make the n-th file-system operation raise, before or after it took effect; returns a log."""
    log: list[str] = []

    def wrap(original, name):
        def operation(*args, **kwargs):
            # Reading takes part in no save; only what changes the disk is a point of its own.
            if name == "open" and not set("wxa+") & set(args[1] if len(args) > 1 else "r"):
                return original(*args, **kwargs)
            log.append(name)
            if len(log) - 1 != n:
                return original(*args, **kwargs)
            if not before and (opened := original(*args, **kwargs)) is not None:
                opened.close()
            raise Killed(name)

        return operation

    for module, name in [(os, "fsync"), (os, "replace"), (os, "mkdir"), (shutil, "rmtree")]:
        monkeypatch.setattr(module, name, wrap(getattr(module, name), name))
    for module in (checkpoint, tensor_file, run_directory):
        monkeypatch.setattr(module, "open", wrap(builtins.open, "open"), raising=False)
    return log


@pytest.mark.parametrize("before", [True, False])
def test_a_save_killed_at_any_point_leaves_a_whole_checkpoint_and_the_next_save_works(
    tmp_path, before
):
    points = 0
    for n in range(100):
        folder = tmp_path / str(n)
        save(folder, 1, keep=1)
        with pytest.MonkeyPatch.context() as monkeypatch:
            log = kill_at(monkeypatch, n, before=before)
            try:
                save(folder, 2, keep=1)
            except Killed:
                points += 1
        loaded = load_newest(folder, warn=no_warning)
        assert loaded is not None
        assert loaded.step in (1, 2)
        assert_is_state_of(loaded.step, loaded.state)
        sweep(folder)
        save(folder, 3, keep=1)
        assert os.listdir(folder) == ["step-00000003"]
        if n >= len(log):
            break
    # Three files and the folder synced, two renames, a parent synced, a removal and more.
    assert points >= 12
    assert loaded.step == 2, "the last round is not interrupted"


def test_everything_is_durable_before_the_rename_and_the_name_right_after(tmp_path, monkeypatch):
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def logged_replace(source, target):
        events.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    names = [name for _, name in events]
    assert names[:3] == ["state.safetensors", "state.json", "MANIFEST.json"]
    assert names[3].startswith(".tmp-step-00000001-")
    assert events[4:] == [("rename", "step-00000001"), ("sync", "checkpoints")]


def test_a_flipped_bit_anywhere_in_any_file_is_detected_and_the_file_named(tmp_path):
    path = save(tmp_path, 1)
    generator = random.Random(0)
    for name in ("state.safetensors", "state.json", "MANIFEST.json"):
        file = path / name
        good = file.read_bytes()
        bits = [generator.randrange(len(good) * 8) for _ in range(200)]
        for bit in bits:
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bad)
            with pytest.raises(CheckpointError, match=name):
                verify_checkpoint(path)
        file.write_bytes(good)
    assert verify_checkpoint(path)["step"] == 1


def test_every_truncation_and_extension_is_detected(tmp_path):
    path = save(tmp_path, 1)
    for name in ("state.safetensors", "state.json", "MANIFEST.json"):
        file = path / name
        good = file.read_bytes()
        for size in {0, 1, len(good) // 2, len(good) - 1}:
            file.write_bytes(good[:size])
            with pytest.raises(CheckpointError, match=name):
                verify_checkpoint(path)
        file.write_bytes(good + b"\n")
        with pytest.raises(CheckpointError, match=name):
            verify_checkpoint(path)
        file.unlink()
        with pytest.raises(CheckpointError, match=name):
            verify_checkpoint(path)
        file.write_bytes(good)


def test_the_newest_good_checkpoint_is_loaded_and_the_damage_told(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000003" / "state.json").write_text("{}")
    (tmp_path / "step-00000002" / "MANIFEST.json").unlink()
    warnings: list[str] = []
    loaded = load_newest(tmp_path, warn=warnings.append)
    assert loaded is not None
    assert loaded.step == 1
    assert "step-00000003/state.json" in warnings[0]
    assert "step-00000002/MANIFEST.json" in warnings[1]
    assert all("going on from step 1" in warning for warning in warnings)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_rather_than_restarted(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "MANIFEST.json").write_text("")
    with pytest.raises(CheckpointError, match=r"none verifies.*start from step 0"):
        load_newest(tmp_path, warn=no_warning)


def resign(path: Path, change) -> None:
    """Rewrite a manifest with a valid hash of its own, as someone who knows the format could."""
    file = path / "MANIFEST.json"
    manifest = json.loads(file.read_text())
    del manifest["self_sha256"]
    change(manifest)
    file.write_bytes(sealed(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].update({"../../secret": {"sha256": "0" * 64, "size": 1}}),
        lambda m: m["files"].pop("state.json"),
        lambda m: m["files"]["state.json"].update(extra=1),
        lambda m: m.update(step="1"),
        lambda m: m.update(step=2),
        lambda m: m.update(format=99),
        lambda m: m.update(files=[]),
        lambda m: m.pop("files"),
    ],
)
def test_a_manifest_with_valid_hashes_but_evil_content_is_refused(tmp_path, change):
    path = save(tmp_path, 1)
    resign(path, change)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json"):
        verify_checkpoint(path)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":', "null", "[]", "\x00", " " * 2_000_000])
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path, content):
    path = save(tmp_path, 1)
    (path / "MANIFEST.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json"):
        read_checkpoint(path)


def test_a_link_in_place_of_a_file_is_refused(tmp_path):
    path = save(tmp_path, 1)
    shutil.move(path / "state.json", tmp_path / "elsewhere.json")
    (path / "state.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="plain file"):
        verify_checkpoint(path)


def test_a_state_that_names_tensors_it_does_not_have_is_refused(tmp_path):
    path = save(tmp_path, 1)
    content = json.dumps({"pair": {"$tensor": "no/such"}}).encode()
    (path / "state.json").write_bytes(content)

    def change(manifest):
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"]["state.json"] = {"sha256": digest, "size": len(content)}

    resign(path, change)
    with pytest.raises(CheckpointError, match="no/such"):
        read_checkpoint(path)


def test_the_newest_are_kept_and_a_damaged_one_takes_nobodys_place(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=10)
    (tmp_path / "step-00000003" / "state.json").write_text("")
    prune(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000004",
        "step-00000003",
        "step-00000002",
    ]


def test_saving_a_step_again_keeps_a_good_one_and_replaces_a_damaged_one(tmp_path):
    path = save(tmp_path, 1)
    before = (path / "MANIFEST.json").stat().st_ino
    save(tmp_path, 1)
    assert (path / "MANIFEST.json").stat().st_ino == before
    (path / "state.safetensors").write_bytes(b"")
    save(tmp_path, 1)
    assert_is_state_of(1, read_checkpoint(path).state)
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_leftovers_of_killed_saves_are_swept_and_nothing_else(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".tmp-step-00000002-abc").mkdir()
    (tmp_path / ".tmp-step-00000002-abc" / "state.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    outside = tmp_path.parent / "outside"
    outside.mkdir()
    (tmp_path / ".tmp-link").symlink_to(outside)
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "step-00000001"]
    assert outside.is_dir()


@pytest.mark.parametrize("call", range(4))
def test_a_full_disk_is_an_output_error_and_the_previous_checkpoint_stays(
    tmp_path, monkeypatch, call
):
    save(tmp_path, 1)
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == call + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full") as caught:
        save(tmp_path, 2)
    assert caught.value.exit_code == 7
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert_is_state_of(1, read_checkpoint(tmp_path / "step-00000001").state)


def test_settings_that_matter_are_named_and_harmless_ones_are_not():
    former = to_dict(Config())
    changes = {
        "model.arch": "vitb14",
        "run.seed": 1,
        "crops.global_scale": (0.4, 1.0),
        "run.log_every_steps": 3,
        "run.num_threads": 2,
        "run.stop_step": 9,
        "data.num_workers": 0,
        "data.path": "elsewhere",
    }
    current = to_dict(Config().updated(changes))
    assert differing_keys(former, current) == [
        "crops.global_scale: [0.32, 1.0] -> [0.4, 1.0]",
        "model.arch: vits14 -> vitb14",
        "run.seed: 0 -> 1",
    ]
    assert config_hash(former) != config_hash(current)


def test_the_hash_of_a_configuration_ignores_harmless_settings_and_survives_json():
    former = to_dict(Config())
    harmless = to_dict(Config().updated({"run.log_every_steps": 3, "run.device": "cpu"}))
    assert config_hash(former) == config_hash(harmless)
    assert config_hash(former) == config_hash(json.loads(json.dumps(former)))
    assert differing_keys(json.loads(json.dumps(former)), harmless) == []
