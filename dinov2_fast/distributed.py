"""Sums across processes that also work in one process: without a group every call is the identity.

No call here takes part in autograd; statistics that cross processes carry no gradient.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def is_initialized() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Number of this process in the group (None: all processes); 0 without a group."""
    return dist.get_rank(group) if is_initialized() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes in the group (None: all processes); 1 without a group."""
    return dist.get_world_size(group) if is_initialized() else 1


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Replace a tensor by its sum over the group.

    Args:
        tensor: any shape, the same on every process; changed in place.
        group: processes that take part; None is all of them.
    Returns:
        The same tensor.
    """
    return _all_reduce(tensor, "sum", group)


def all_reduce_max(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Replace a tensor by its element-wise maximum over the group.

    Args:
        tensor: any shape, the same on every process; changed in place.
        group: processes that take part; None is all of them.
    Returns:
        The same tensor.
    """
    return _all_reduce(tensor, "max", group)


def all_reduce_mean(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Replace a tensor by its mean over the group; a sum first, so every backend can do it.

    Args:
        tensor: any shape, the same on every process; floating point; changed in place.
        group: processes that take part; None is all of them.
    Returns:
        The same tensor.
    """
    return _all_reduce(tensor, "sum", group).div_(world_size(group))


def broadcast(tensor: Tensor, source: int = 0, group: dist.ProcessGroup | None = None) -> Tensor:
    """Replace a tensor by the one of another process.

    Args:
        tensor: any shape, the same on every process; changed in place.
        source: rank of the sender among all processes.
        group: processes that take part; None is all of them.
    Returns:
        The same tensor.
    """
    if world_size(group) > 1:
        dist.broadcast(tensor.detach(), source, group=group)
    return tensor


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait until every process of the group (None: all processes) has come here."""
    if world_size(group) > 1:
        dist.barrier(group)


def _all_reduce(tensor: Tensor, operation: str, group: dist.ProcessGroup | None) -> Tensor:
    # Looked up here: a torch built without distributed has no ReduceOp.
    if world_size(group) > 1:
        reduce_op = dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX
        dist.all_reduce(tensor.detach(), op=reduce_op, group=group)
    return tensor
