"""One of two processes that train an accelerated model: arguments are rank, wrapper and folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dinov2_fast import accelerate
from dinov2_fast.drop_in import half_block, limits
from tests.drop_in.their_models import ANY_SIZE, blocks_of, images, make, run


def main() -> None:
    torch.set_num_threads(1)
    rank, (wrapper, kind, folder) = int(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    limits.limits_of = lambda _: ANY_SIZE  # as if the batch were large
    owned = []
    original = half_block.HalfBlock._run_owned
    half_block.HalfBlock._run_owned = lambda self, *args: owned.append(1) or original(self, *args)
    model: Any = make(kind)
    accelerate(model)
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        for block in blocks_of(model):
            fully_shard(block)
        fully_shard(model)
    x = images(kind, batch=4)[2 * rank : 2 * rank + 2]
    run(model, x).square().sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            gradients[name.removeprefix("module.")] = gradient
    assert len(owned) == 2 * len(blocks_of(getattr(model, "module", model)))
    if rank == 0:
        torch.save(gradients, Path(folder) / "gradients.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
