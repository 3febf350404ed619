"""Accelerated models under DDP and fully_shard: the gradients of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov2_fast import accelerate, restore
from tests.drop_in.their_models import THIRD_PARTY, images, make, run

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("on_native"), *THIRD_PARTY]


def two_processes(module: str, *arguments: str) -> list[subprocess.Popen]:
    """Both ranks of a module beside this file."""
    command = [sys.executable, "-W", "ignore", "-m", f"tests.drop_in.{module}"]
    root = Path(__file__).parents[2]
    return [subprocess.Popen([*command, str(rank), *arguments], cwd=root) for rank in range(2)]


@pytest.mark.parametrize(
    ("wrapper", "kind"),
    [
        pytest.param("ddp", "timm dinov2", marks=pytest.mark.slow),
        ("fully_shard", "timm dinov2"),
        pytest.param("fully_shard", "hf swiglu", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_two_processes_are_those_of_one(wrapper, kind, tmp_path):
    model = make(kind)  # before the processes start: skips where the library is missing
    ranks = two_processes("rank_gradients", wrapper, kind, str(tmp_path))
    run(model, images(kind, batch=4)).square().sum().backward()

    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    named = {name: p.grad / 2 for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == named.keys()
    for name, value in named.items():
        if not name.endswith("k_proj.bias"):  # exactly zero
            assert (gradients[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fully_shard"])
@pytest.mark.parametrize("kind", ["timm dinov2", "hf dinov2"])
def test_training_with_drop_path_and_checkpointing_is_the_originals(wrapper, kind, tmp_path):
    make(kind)  # skips where the library is missing
    ranks = two_processes("rank_training", wrapper, kind, str(tmp_path))

    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]


def test_restore_refuses_what_something_else_has_wrapped():
    model = make("timm plain")
    accelerate(model)
    block = model.blocks[0]
    block.__class__ = type("FSDPBlock", (type(block),), {})  # as fully_shard does

    with pytest.raises(ValueError, match="restore: expected blocks as accelerate left them"):
        restore(model)
