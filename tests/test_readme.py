"""README.md is run as written: its Python block, its commands with the placeholders filled in."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_fast import cli

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for kind, text in BLOCKS
    if kind == "bash"
    for line in text.splitlines()
]


@pytest.fixture
def labelled_images(tmp_path):
    """Two classes of twelve photographs' worth of noise: enough to train two steps and to vote."""
    generator = np.random.default_rng(0)
    for label, level in (("dark", 60), ("light", 180)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(12):
            pixels = generator.normal(level, 30, (64, 64, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{index}.png")
    return tmp_path / "images"


def test_the_make_targets_exist():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    targets = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert targets[:2] == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_the_python_block_runs():
    (source,) = [text for kind, text in BLOCKS if kind == "python"]
    names: dict = {}
    exec(compile(source, str(README), "exec"), names)
    assert names["features"]["x_norm_patchtokens"].shape == (1, 16 * 20, 384)
    assert names["attention"].shape == (1, 6, 1 + 4 + 320, 1 + 4 + 320)
    assert [entry["x_norm_clstoken"].shape[0] for entry in names["both"]] == [1, 8]


def test_every_command_runs_in_order(labelled_images, tmp_path, capsys):
    # The preset is the small one and two steps are enough; every word else is README's.
    places = {
        "DIR": str(labelled_images),
        "LABELLED": str(labelled_images),
        "OUT": str(tmp_path / "out"),
        "OUT/teacher.safetensors": str(tmp_path / "out" / "teacher.safetensors"),
        "HF_DIR": str(tmp_path / "hf"),
        "features.safetensors": str(tmp_path / "features.safetensors"),
        "vits14": "debug",
        "vits": "debug",
    }
    ran = []
    for command in COMMANDS:
        words = [places.get(word, word) for word in shlex.split(command)]
        if not words or words[0] != "dinov2-fast":
            continue
        if words[1] == "train" and "--out" in words:
            words += ["--steps", "2", "--batch-size", "2", "--data.num-workers", "0"]
        if words[1] == "bench":
            words += ["--batch-size", "1", "--prototypes", "64", "--steps", "1", "--rounds", "1"]
        assert cli.run(words[1:]) == 0, capsys.readouterr().err
        ran.append(words[1])
    assert ran == ["doctor", "train", "train", "eval", "embed", "convert", "bench"]
    assert (tmp_path / "hf" / "config.json").is_file()
    assert (tmp_path / "features.safetensors").is_file()


@pytest.mark.usefixtures("on_native")
def test_the_examples_run():
    for library in ("timm", "skimage"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    (command,) = [words for words in map(shlex.split, COMMANDS) if words[:1] == ["python"]]
    fewer = ["--steps", "2", "--batch-size", "2"]  # every word else is README's

    out = subprocess.run(
        [sys.executable, "-W", "ignore", *command[1:], *fewer],
        cwd=README.parent,
        env={**os.environ, "PYTHONPATH": str(README.parent)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    assert "replaced: attention of 4 blocks" in out
    assert re.search(r"accuracy on 450 test crops: \S+% before, \S+% after", out)


def test_inline_commands_are_known(capsys):
    inline = re.findall(r"`(dinov2-fast [^`]*)`", README.read_text(encoding="utf-8"))
    assert inline
    for command in inline:
        assert cli.run(shlex.split(command)[1:]) == 0, command
