"""What the two processes of a distributed test of accelerated models do alike."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dinov2_fast.drop_in import half_block, limits
from tests.drop_in.their_models import ANY_SIZE, blocks_of


def start() -> tuple[int, str, str, str, list[int]]:
    """Join the other process, and note halves that own their memory, which they do at any size.

    Returns:
        The process's arguments: rank, wrapper, kind of model and folder; and a list that grows with
        every such half.
    """
    torch.set_num_threads(1)
    rank, (wrapper, kind, folder) = int(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    limits.limits_of = lambda _: ANY_SIZE  # as if the batch were large
    owned: list[int] = []
    original = half_block.HalfBlock._run_owned
    half_block.HalfBlock._run_owned = lambda self, *args: owned.append(1) or original(self, *args)
    return rank, wrapper, kind, folder, owned


def shard(model: Any) -> nn.Module:
    """The model with every block sharded on its own."""
    for block in blocks_of(model):
        fully_shard(block)
    return fully_shard(model)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is not spread over processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
