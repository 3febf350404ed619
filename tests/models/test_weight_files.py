"""Weight files: what is read, what is refused, what is written."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dinov2_fast.errors import CheckpointError, OutputError
from dinov2_fast.models.weight_files import (
    DESCRIPTION_KEY,
    load_weights,
    read_weight_file,
    write_pickle,
    write_safetensors,
)
from tests.models.weights import states_equal

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


class Payload:
    """An object whose unpickling makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_pickles_of_tensors_are_read(tmp_path, suffix):
    torch.save(STATE, tmp_path / f"w{suffix}")

    assert states_equal(load_weights(tmp_path / f"w{suffix}"), STATE)


def test_safetensors_are_read_with_what_they_say_about_the_model(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", STATE, {DESCRIPTION_KEY: '{"num_heads": 3}'})

    file = read_weight_file(tmp_path / "w.safetensors")

    assert states_equal(file.state, STATE)
    assert file.description == {"num_heads": 3}


@pytest.mark.parametrize("metadata", ["{", "[1]", "7"])
def test_damaged_metadata_is_refused(tmp_path, metadata):
    write_safetensors(tmp_path / "w.safetensors", STATE, {DESCRIPTION_KEY: metadata})

    with pytest.raises(CheckpointError, match="damaged metadata"):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("content", "prefix"),
    [
        (lambda state: {"teacher": state}, "teacher."),
        (lambda state: {"teacher": state, "student": {}, "epoch": 3}, "teacher."),
        (lambda state: {"student": state, "optimizer": {"lr": 0.1}}, "student."),
        (lambda state: {"model": state, "iteration": 7}, ""),
        (lambda state: {"state_dict": {"model": {"teacher": state}}}, "teacher."),
    ],
)
def test_networks_are_found_in_training_checkpoints(tmp_path, content, prefix):
    torch.save(content(STATE), tmp_path / "c.pth")

    expected = {f"{prefix}{key}": tensor for key, tensor in STATE.items()}
    assert states_equal(load_weights(tmp_path / "c.pth"), expected)


def test_of_a_checkpoint_in_safetensors_only_the_teacher_is_read(tmp_path):
    teacher = {f"teacher.backbone.{key}": tensor for key, tensor in STATE.items()}
    rest = {"student.backbone.a": torch.zeros(1), "optimizer.exp_avg.a": torch.zeros(1)}
    save_file({**teacher, **rest}, tmp_path / "state.safetensors")

    assert states_equal(load_weights(tmp_path / "state.safetensors"), teacher)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, legacy):
    trap = tmp_path / "ran"
    torch.save(
        {**STATE, "x": Payload(trap)},
        tmp_path / "evil.pth",
        _use_new_zipfile_serialization=not legacy,
    )

    with pytest.raises(CheckpointError, match="holds more than tensors, and is not run") as caught:
        load_weights(tmp_path / "evil.pth")

    assert not trap.exists()
    assert "weights_only" not in str(caught.value)  # no advice to switch the protection off


def test_a_bare_pickle_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "ran"
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Payload(trap)))

    with pytest.raises(CheckpointError, match=r"evil.pth .*, and is not run"):
        load_weights(tmp_path / "evil.pth")
    assert not trap.exists()


@pytest.mark.parametrize(
    "content", [[1, 2], 3, {}, {"epoch": 1}, {"a": torch.ones(1), "epoch": 1}, {"model": 3}]
)
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")

    with pytest.raises(CheckpointError, match=r"expected .*c\.pth to hold a state dict"):
        load_weights(tmp_path / "c.pth")


def test_a_mapping_that_holds_itself_ends(tmp_path):
    content: dict = {}
    content["model"] = content
    torch.save(content, tmp_path / "c.pth")

    with pytest.raises(CheckpointError, match="to hold a state dict"):
        load_weights(tmp_path / "c.pth")


def test_every_truncation_of_safetensors_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(STATE, path)
    whole = path.read_bytes()

    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(
            CheckpointError, match=r"w\.safetensors is damaged or not a safetensors"
        ):
            load_weights(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_torch_file_is_refused(tmp_path, share):
    path = tmp_path / "w.pth"
    torch.save(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])

    with pytest.raises(CheckpointError, match=r"w\.pth is damaged"):
        load_weights(path)


def test_a_torch_file_without_a_part_is_refused(tmp_path):
    torch.save(STATE, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as source,
        zipfile.ZipFile(tmp_path / "cut.pth", "w") as target,
    ):
        for name in source.namelist():
            if not name.endswith("data/0"):
                target.writestr(name, source.read(name))

    with pytest.raises(CheckpointError, match=r"cut\.pth is damaged"):
        load_weights(tmp_path / "cut.pth")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), suffix=st.sampled_from([0, 1]))
def test_a_changed_byte_is_read_or_refused_but_never_crashes(tmp_path, position, value, suffix):
    path = tmp_path / ("w.safetensors", "w.pth")[suffix]
    if suffix:
        torch.save(STATE, path)
    else:
        save_file(STATE, path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)

    try:
        state = load_weights(path)
    except CheckpointError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())


def test_missing_files_and_unknown_names_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth does not exist"):
        load_weights(tmp_path / "none.pth")
    (tmp_path / "w.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"ending in \.safetensors, \.pth.* got w\.npz"):
        load_weights(tmp_path / "w.npz")
    with pytest.raises(CheckpointError, match="folder saved by transformers"):
        load_weights(tmp_path)


def test_a_transformers_folder_is_read_in_one_file_or_in_shards(tmp_path):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 5}')
    save_file(STATE, tmp_path / "model.safetensors")
    assert read_weight_file(tmp_path).description == {"num_heads": 5}
    assert states_equal(load_weights(tmp_path), STATE)

    (tmp_path / "model.safetensors").unlink()
    for index, key in enumerate(STATE):
        save_file({key: STATE[key]}, tmp_path / f"model-{index}.safetensors")
    shards = {key: f"model-{index}.safetensors" for index, key in enumerate(STATE)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert states_equal(load_weights(tmp_path), STATE)


def test_a_shard_index_does_not_lead_out_of_its_folder(tmp_path):
    save_file(STATE, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"num_attention_heads": 5}')
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match=r"model/secret\.safetensors does not exist"):
        load_weights(folder)


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"num_attention_heads": "many"}'])
def test_a_folder_with_a_damaged_config_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(config)

    with pytest.raises(CheckpointError, match="folder saved by transformers"):
        load_weights(tmp_path)


def test_written_files_hold_nothing_beside_their_tensors(tmp_path):
    big = torch.zeros(1000, 10)
    views = {"row": big[3], "column": big[:, 3], "same": big[3]}

    write_pickle(tmp_path / "w.pth", views)
    write_safetensors(tmp_path / "w.safetensors", views, {})

    for name in ("w.pth", "w.safetensors"):
        assert (tmp_path / name).stat().st_size < 8_000
        assert states_equal(load_weights(tmp_path / name), views)


def test_equal_weights_are_equal_files(tmp_path):
    for name in "ab":
        write_safetensors(tmp_path / f"{name}.safetensors", STATE, {"k": "v"})

    a, b = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize("write", [write_pickle, lambda p, s: write_safetensors(p, s, {})])
def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch, write):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"w\.safetensors cannot be written: .*No space left"):
        write(path, STATE)

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "no" / "such" / "folder.safetensors", STATE)
