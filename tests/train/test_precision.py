"""`run.precision: auto` is decided once: by the processor, or by the start of the run."""

from __future__ import annotations

import pytest
import torch
import yaml

from dinov2_fast.config import Config, to_dict
from dinov2_fast.ops import _matmul as matmul
from dinov2_fast.train import precision
from dinov2_fast.train.precision import choose_precision, with_precision
from dinov2_fast.train.run_directory import RunDirectory

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["fast bfloat16", "slow bfloat16"])
def processor(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: request.param)
    return "bf16" if request.param else "fp32"


def test_auto_is_what_the_processor_is_faster_at(tmp_path, processor):
    config = with_precision(Config(), RunDirectory(tmp_path / "run"), CPU)

    assert Config().run.precision == "auto"
    assert config.run.precision == processor


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("begun", ["fp32", "bf16"])
def test_a_run_keeps_what_it_began_with(tmp_path, begun):
    files = RunDirectory(tmp_path)
    files.config.write_text(yaml.safe_dump(to_dict(Config().updated({"run.precision": begun}))))

    assert with_precision(Config(), files, CPU).run.precision == begun


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_an_explicit_precision_stays(tmp_path, asked):
    config = Config().updated({"run.precision": asked})

    assert with_precision(config, RunDirectory(tmp_path), CPU) == config


@pytest.mark.parametrize("text", ["", "run: 3", "run: {precision: auto}", "[", "\0"])
def test_an_unreadable_configuration_decides_nothing(tmp_path, processor, text):
    files = RunDirectory(tmp_path)
    files.config.write_text(text)

    assert with_precision(Config(), files, CPU).run.precision == processor


def test_this_processor_has_an_answer():
    assert choose_precision(CPU) == ("bf16" if matmul.has_fast_bfloat16() else "fp32")
