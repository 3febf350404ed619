"""One of two processes that train an accelerated model: arguments are rank, wrapper and folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dinov2_fast import accelerate
from tests.drop_in.ranks import shard, start, whole
from tests.drop_in.their_models import blocks_of, images, make, run


def main() -> None:
    rank, wrapper, kind, folder, owned = start()
    model: Any = make(kind)
    accelerate(model)
    model = DistributedDataParallel(model) if wrapper == "ddp" else shard(model)
    x = images(kind, batch=4)[2 * rank : 2 * rank + 2]
    run(model, x).square().sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name.removeprefix("module.")] = whole(parameter.grad)
    assert len(owned) == 2 * len(blocks_of(getattr(model, "module", model)))
    if rank == 0:
        torch.save(gradients, Path(folder) / "gradients.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
