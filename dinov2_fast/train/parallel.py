"""Where this process runs, and how it agrees with the others of the run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from dinov2_fast.errors import ConfigError, UserError

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=30)


class PeerStoppedError(UserError):
    """Another process of the run stopped; its own message says why."""


@dataclass(frozen=True)
class Place:
    """One process of a run.

    Args:
        device: where the networks of this process live.
        rank: number of this process, 0 to world_size - 1; rank 0 writes files and speaks.
        world_size: processes of the run.
        local_world_size: those of them on this machine.
        control: group for decisions on the host, apart from the one that sums gradients.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def agree(self, code: int) -> int:
        """The largest code that any process brings: one decision for all of them."""
        if self.world_size == 1:
            return code
        shared = torch.tensor(code)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.control)
        return int(shared)

    def gather(self, value: T) -> list[T]:
        """What every process brought, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def on_main(self, action: Callable[[], T]) -> T:
        """Let rank 0 act, and every process leave when that failed.

        Args:
            action: what rank 0 does; its result must pickle.
        Returns:
            The result, on every process.
        Raises:
            PeerStoppedError: on the other processes, with the exit code of the error on rank 0.
        """
        if self.world_size == 1:
            return action()
        outcome: list[Any] = [None, None]
        try:
            if self.is_main:
                outcome[0] = action()
        except BaseException as error:
            outcome[1] = (str(error), getattr(error, "exit_code", 1))
            raise
        finally:
            dist.broadcast_object_list(outcome, src=0, group=self.control)
        if outcome[1] is not None:
            raise peer_stopped(*outcome[1])
        return outcome[0]


def peer_stopped(message: str, exit_code: int) -> PeerStoppedError:
    """The error of a process that leaves because another one met an error."""
    error = PeerStoppedError(f"stopping because another process of the run stopped: {message}")
    error.exit_code = exit_code
    return error


@contextlib.contextmanager
def joined(device: str = "auto", *, num_threads: int = 0) -> Iterator[Place]:
    """Join the processes that `torchrun` started, or run alone, for the length of a `with` block.

    Args:
        device: auto, cpu, cuda or cuda:N; under `torchrun` cuda means one GPU per local process.
        num_threads: CPU threads of this process inside the block; 0 keeps torch's choice.
    Raises:
        ConfigError: the device is not one of this machine.
    """
    world_size = launched_processes()
    chosen = choose_device(device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    former_threads = torch.get_num_threads()
    if num_threads > 0:
        torch.set_num_threads(num_threads)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    try:
        if world_size == 1:
            yield Place(chosen)
            return
        _init_process_group(chosen)
        try:
            control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_TIMEOUT))
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            yield Place(chosen, dist.get_rank(), dist.get_world_size(), local, control)
        finally:
            dist.destroy_process_group()
    finally:
        torch.set_num_threads(former_threads)


def launched_processes() -> int:
    """Processes that the launcher started for this run; 1 without a launcher."""
    # Some clusters set WORLD_SIZE alone, for jobs that start their processes themselves.
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def choose_device(device: str, *, local_rank: int = 0) -> torch.device:
    """The device that a setting means on this machine.

    Args:
        device: auto, cpu, cuda or cuda:N.
        local_rank: number of this process on this machine; picks the GPU when no N is given.
    Raises:
        ConfigError: no such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"run.device: expected auto, cpu, cuda or cuda:N, got {device!r}")
    if chosen.type == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = local_rank if chosen.index is None else chosen.index
    if index >= found:
        raise ConfigError(
            f"run.device: expected one of {found} usable GPUs, got cuda:{index}; "
            "use --device cpu or start fewer processes"
        )
    return torch.device("cuda", index)


def distribute(module: nn.Module, place: Place) -> nn.Module:
    """The module with gradients averaged over the processes; the module itself in a run of one.

    Args:
        module: its parameters must already be on `place.device`; rank 0's values win.
        place: this process.
    """
    if place.world_size == 1:
        return module
    return nn.parallel.DistributedDataParallel(
        module,
        device_ids=[place.device] if place.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def _init_process_group(device: torch.device) -> None:
    """Meet the other processes under a name that a restart does not share with the dead.

    An elastic agent keeps one store over restarts, and addresses in it may belong to processes
    that were killed. Source: pytorch/pytorch#135712.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=_TIMEOUT))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        generation = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"dinov2_fast/{generation}", store)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
