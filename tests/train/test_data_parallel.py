"""Two processes with half a batch each compute what one process computes with all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tests.train.rank_gradients import part_of, step, whole_batch


def test_two_processes_average_to_the_losses_and_gradients_of_one(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.rank_gradients", str(rank), "2", str(tmp_path)],
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    alone = step(part_of(whole_batch(), rank=0, world_size=1), wrap=False)
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["loss.ibot"] != second["loss.ibot"]
    for name, value in alone.items():
        if name.startswith("loss."):
            torch.testing.assert_close((first[name] + second[name]) / 2, value, msg=name)
        else:  # averaged in the backward pass already
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, msg=name)
