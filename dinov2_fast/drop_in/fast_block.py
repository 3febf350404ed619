"""Blocks of other libraries whose class is exchanged for one that runs their halves faster.

The object stays the same, so that parameters, buffers, hooks on the block, state-dict keys,
`isinstance` and whoever holds a reference to it see no difference; only `forward` is another one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dinov2_fast.backends import choose_backend
from dinov2_fast.drop_in import limits
from dinov2_fast.drop_in.half_block import (
    Entrance,
    HalfBlock,
    Path,
    dropped_ratio,
    is_rewritten,
    runs_plainly,
)
from dinov2_fast.packing import Pack, pack_tokens, unpack_tokens

OPTIONS = "_dinov2_fast"  # attribute of an accelerated block that holds its Options


class FastBlock(nn.Module):
    """The faster `forward`, in front of a library's block class; a subclass knows its modules."""

    takes_lists = False  # whether a list of batches may stand for the tokens
    neutral: frozenset[str] = frozenset()  # options that change nothing a block computes
    original: type[nn.Module]  # the library's class, set by `fast_class`

    def forward(self, *args: Any, **options: Any) -> Any:
        """Both halves of the block.

        Args:
            *args: [B, N, C] tokens, then the library's other arguments (masks, flags): what is
                neither None nor False makes the block run as its library wrote it.
            **options: the same by name; `neutral` ones aside.
        Returns:
            What the library's block returns.
        """
        if not args:  # tokens under a name that only the library knows
            return super().forward(**options)
        x, *others = args
        # Cheap questions first: calls of Python cost a toy's batch some promille each. While a
        # compiler or tracer looks on nobody asks for sizes, of which it would take note.
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return super().forward(*args, **options)
        if isinstance(x, Tensor) and not self._may_pay(x):
            return super().forward(*args, **options)
        asked = (*others, *(value for name, value in options.items() if name not in self.neutral))
        asks_for_more = any(value is not None and value is not False for value in asked)
        if asks_for_more or runs_plainly() or is_rewritten(self.original):
            return super().forward(*args, **options)
        if isinstance(x, Tensor):
            halves, chosen = type(self).halves(self), getattr(self, OPTIONS)
            paths: list[Path] = [half.path(x, chosen) for half in halves]
            if any(path != "library" for path in paths):
                pack = Pack.from_groups([(x.shape[0], x.shape[1])], x.device)
                return self._run(halves, paths, x, pack).view(x.shape)
        elif self.takes_lists and isinstance(x, (list, tuple)):
            tokens, pack = pack_tokens(x)
            halves = type(self).halves(self)
            if not any(half.why_left() or half.why_not_owned(tokens) for half in halves):
                return unpack_tokens(self._run(halves, ("owned", "owned"), tokens, pack), pack)
        return super().forward(*args, **options)

    @staticmethod
    def halves(block: nn.Module) -> tuple[HalfBlock, HalfBlock]:
        """The attention half and the feed-forward half of a block, in the order they run."""
        raise NotImplementedError("a subclass, one for each library, describes its halves")

    @staticmethod
    def drop_ratio(block: nn.Module) -> float:
        """The larger share of samples that a half drops in training."""
        raise NotImplementedError("a subclass, one for each library, knows where it stands")

    def _may_pay(self, x: Tensor) -> bool:
        """Whether any path but the library's can pay, asked before anyone looks at the halves."""
        if x.ndim != 3:
            return False
        batch_size, length, channels = x.shape
        num_tokens, least = batch_size * length, limits.limits_of(x)
        if (
            least.owned_pays(num_tokens, channels)
            and (least.without_gradients or torch.is_grad_enabled() or self._drops())
            and choose_backend("layer_norm", x, None) != "reference"
        ):
            return True
        if not self.training or num_tokens * channels**2 < least.saved_work:
            return False
        mode = getattr(self, OPTIONS).drop_path
        dropped = dropped_ratio(type(self).drop_ratio(self), batch_size, mode)
        return least.skipping_pays(num_tokens, channels, dropped)

    def _drops(self) -> bool:
        """Whether a half drops samples: checkpointing may ask for them without gradients first."""
        return self.training and type(self).drop_ratio(self) > 0

    def _run(
        self, halves: tuple[HalfBlock, ...], paths: Sequence[Path], x: Tensor, pack: Pack
    ) -> Tensor:
        # Nodes that own their memory write to it; the others leave the block's input alone.
        owned = "owned" in paths
        tokens = cast(Tensor, Entrance.apply(x)) if owned else x.reshape(-1, x.shape[-1])
        for half, path in zip(halves, paths, strict=True):
            tokens = half.run(tokens, pack, x.shape, path, getattr(self, OPTIONS))
        return tokens

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` asks before it reads any source."""
        raise RuntimeError(
            "torch.jit.script: expected blocks as their library wrote them, got an accelerated "
            f"{self.original.__name__}; call restore(model) first, or use torch.export"
        )

    def _get_name(self) -> str:
        """What `print(model)` shows."""
        return f"Fast{super()._get_name()}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickling and copying by the two classes that make up this one."""
        kind = type(self)
        return _new_block, (kind.__mro__[1], kind.original), self.__getstate__()


@functools.cache
def fast_class(fast: type[FastBlock], original: type[nn.Module]) -> type[FastBlock]:
    """The class of an accelerated block.

    Args:
        fast: knows the library's modules.
        original: the library's block class.
    Returns:
        A subclass of both, the same one for the same arguments. It has the library's name, by which
        FSDP's wrapping policies and device maps find blocks.
    """
    attributes = {
        "original": original,
        "__module__": original.__module__,
        "__qualname__": f"Fast{original.__qualname__}",
        "__doc__": fast.__doc__,
    }
    return cast("type[FastBlock]", type(original.__name__, (fast, original), attributes))


def _new_block(fast: type[FastBlock], original: type[nn.Module]) -> nn.Module:
    """An accelerated block without state, for pickle and copy."""
    kind = fast_class(fast, original)
    return kind.__new__(kind)
