"""One of two processes: an accelerated model, and the original, wrapped the same and trained.

Arguments are rank, wrapper, kind and a folder. Drop path is above 0, every block is checkpointed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dinov2_fast import accelerate
from tests.drop_in.ranks import shard, start, whole
from tests.drop_in.their_models import DROP_RATIO, images, make, run

NUM_STEPS = 3


def wrap(model: Any, wrapper: str) -> nn.Module:
    """The model under one of torch's wrappers, its blocks checkpointed."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable()
    if wrapper == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)  # HF's mask token
    return shard(model)


def losses_and_gradients(model: nn.Module, x: Tensor, rank: int) -> list[Tensor]:
    """Loss and gradients of every step, whose draws differ between processes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = []
    for step in range(NUM_STEPS):
        torch.manual_seed(100 * rank + step)
        loss = run(model, x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = [whole(p.grad).flatten() for p in model.parameters() if p.grad is not None]
        found += [loss.detach(), torch.cat(gradients)]
        optimizer.step()
    return found


def main() -> None:
    rank, wrapper, kind, _, owned = start()
    x = images(kind, batch=8)[4 * rank : 4 * rank + 4]
    plain = make(kind, DROP_RATIO)
    fast = copy.deepcopy(plain)
    accelerate(fast, drop_path="masked")

    expected = losses_and_gradients(wrap(plain, wrapper), x, rank)
    assert not owned
    found = losses_and_gradients(wrap(fast, wrapper), x, rank)

    # Two blocks of two halves, run again by checkpointing.
    assert len(owned) == 2 * 2 * 2 * NUM_STEPS
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm(), (one, other)
    losses = torch.stack(expected[::2])
    assert losses.unique().numel() == NUM_STEPS  # steps differ in their draws at least
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
