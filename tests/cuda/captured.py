"""What a CUDA graph is, without a GPU: calls that are made again with the arguments they had.

Numbers and addresses stay those of the capture; what stands at the addresses is read anew. Memory
that was allocated in it is the graph's own, and holds anything when a replay begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that wait for a GPU or copy to it from memory of the host.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal", "unique")


class Captured(TorchDispatchMode):
    """Notes operators of torch; `captured` adds launches of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []
        self.launches = False  # then operators are those of what executes kernels here
        self._allocated: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.launches:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        assert not name.startswith(WAITING), f"a graph cannot hold {name}"
        out = func(*args, **kwargs)
        given, found = {storage(x) for x in tensors((args, kwargs))}, tensors(out)
        allocated = [x for x in found if storage(x) not in given]
        self._allocated += allocated

        def again() -> None:
            values = tensors(func(*args, **kwargs))
            for tensor, value in zip(found, values, strict=True):
                if storage(tensor) not in given:
                    tensor.copy_(value)

        if not (allocated and "empty" in name):
            self.calls.append(again)
        return out

    @torch.no_grad()
    def replay(self) -> None:
        """Make all calls again, in order."""
        for tensor in self._allocated:
            tensor.view(-1).view(torch.uint8).fill_(0xA5)
        for call in self.calls:
            call()


@contextlib.contextmanager
def captured(place: Any, launch: str) -> Iterator[Captured]:
    """A graph of what is done inside.

    Args:
        place: an object with a function that launches kernels.
        launch: the function's name.
    """
    execute = getattr(place, launch)
    graph = Captured()

    def noted(*args: Any, **kwargs: Any) -> None:
        graph.launches = True
        execute(*args, **kwargs)
        graph.launches = False
        graph.calls.append(lambda: execute(*args, **kwargs))

    with pytest.MonkeyPatch.context() as patch, graph:
        patch.setattr(place, launch, noted)
        yield graph


def tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
