"""Weights of a run are read only while they are the bytes that the run noted beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dinov2_fast import cli
from dinov2_fast.errors import CheckpointError
from dinov2_fast.manifest import sealed
from dinov2_fast.models import create_model
from dinov2_fast.models.pretrained import backbone_metadata, load_backbone
from dinov2_fast.models.weight_files import load_weights
from dinov2_fast.train.checkpoint import save_checkpoint
from dinov2_fast.train.tensor_file import write_tensors

NAMES = {"checkpoint": "state.safetensors", "teacher": "teacher.safetensors"}


@pytest.fixture(params=NAMES)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run directory with one file of weights and what notes its hash."""
    model = create_model("debug", depth=1)
    state = {"teacher": {"backbone": dict(model.state_dict())}}
    metadata = backbone_metadata(model)
    root = tmp_path / "run"
    if request.param == "checkpoint":
        folder = root / "checkpoints"
        save_checkpoint(folder, state, step=1, facts={}, keep=1, metadata=metadata)
        return root
    root.mkdir()
    file = root / NAMES["teacher"]
    sha256, size = write_tensors(file, state["teacher"]["backbone"], metadata)
    noted = {"finished": True, "files": {file.name: {"sha256": sha256, "size": size}}}
    (root / "summary.json").write_text(json.dumps(noted))
    return root


def weights_of(run: Path) -> Path:
    return next(path for name in NAMES.values() for path in run.rglob(name))


def flip_last_bit(file: Path) -> None:
    """In the last tensor: the file stays a valid one, with another weight in it."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_intact_weights_are_read(run):
    assert load_backbone(weights_of(run)).depth == 1


@pytest.mark.parametrize("verb", ["eval", "embed", "convert"])
def test_verbs_refuse_a_changed_file_with_exit_code_5(run, verb, tmp_path, capsys):
    flip_last_bit(weights_of(run))
    to, data = str(tmp_path / "out.safetensors"), str(tmp_path)
    words = {
        "eval": ["eval", "knn", str(run), "--data", data],
        "embed": ["embed", str(run), "--data", data, "--out", to],
        "convert": ["convert", str(run), to, "--to", "official"],
    }[verb]
    assert cli.run(words) == 5
    said = capsys.readouterr().err
    assert f"{weights_of(run)} was changed: its SHA-256 does not agree" in said
    assert "give another checkpoint of the run" in said


def test_a_cut_file_is_refused_by_its_size(run):
    file = weights_of(run)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"must have \d+ bytes, got \d+; restore it"):
        load_weights(file)


def test_a_file_that_nothing_is_noted_of_is_read_as_it_is(run, tmp_path):
    file = weights_of(run)
    flip_last_bit(file)
    alone = tmp_path / "alone" / file.name
    alone.parent.mkdir()
    shutil.copy(file, alone)
    assert load_weights(alone)


def test_a_checkpoint_may_have_another_name_but_no_damaged_manifest(tmp_path, run):
    file = weights_of(run)
    moved = tmp_path / "kept"
    shutil.copytree(file.parent, moved)
    assert load_weights(moved / file.name)
    manifest = moved / "MANIFEST.json"
    if not manifest.exists():
        return
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json was changed.*restore it"):
        load_weights(moved / file.name)


def test_a_manifest_that_does_not_know_the_file_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, {}, step=1, facts={}, keep=1)
    (path / "MANIFEST.json").write_bytes(sealed({"format": 1, "step": 1, "files": {}}))
    with pytest.raises(CheckpointError, match=r"does not describe state\.safetensors"):
        load_weights(path / NAMES["checkpoint"])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": []}', '{"files": {"teacher": 1}}'])
def test_a_summary_that_notes_no_teacher_stops_nobody(tmp_path, content):
    file = tmp_path / NAMES["teacher"]
    write_tensors(file, {"weight": torch.ones(2)})
    (tmp_path / "summary.json").write_text(content)
    assert load_weights(file)
