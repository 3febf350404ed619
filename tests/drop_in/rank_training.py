"""One of two processes: an accelerated model, and the original, wrapped the same and trained.

Arguments are rank, wrapper, kind and a folder. Drop path is above 0, every block is checkpointed.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dinov2_fast import accelerate
from dinov2_fast.drop_in import half_block, limits
from tests.drop_in.their_models import ANY_SIZE, DROP_RATIO, blocks_of, images, make, run

NUM_STEPS = 3


def wrap(model: Any, wrapper: str) -> nn.Module:
    """The model under one of torch's wrappers, its blocks checkpointed."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable()
    if wrapper == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)  # HF's mask token
    for block in blocks_of(model):
        fully_shard(block)
    return fully_shard(model)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is not spread over processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
    torch.set_num_threads(1)
    rank, (wrapper, kind, folder) = int(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    limits.limits_of = lambda _: ANY_SIZE  # as if the batch were large
    owned = []
    original = half_block.HalfBlock._run_owned
    half_block.HalfBlock._run_owned = lambda self, *args: owned.append(1) or original(self, *args)
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
