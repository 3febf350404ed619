"""What a transformer block executes in a training step, counted without computing anything.

Blocks run, forward and backward under autocast to bfloat16, on tensors without memory. PyTorch's
operations are counted where it dispatches them; kernels of ours are replaced by stand-ins that
count what the kernel reads and writes. Layouts are those of the CPU, on which autocast casts what
it casts on a GPU in these blocks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov2_fast import accelerate
from dinov2_fast.bench.saved import saved_bytes
from dinov2_fast.drop_in import half_block
from dinov2_fast.drop_in.fast_block import FastBlock
from dinov2_fast.nn import residual_branch
from dinov2_fast.ops import _matmul
from dinov2_fast.ops.stochastic_depth import KeptRows, keep_count
from dinov2_fast.packing import Pack

_WRITE_ONLY = ("copy_", "fill_", "zero_", "bernoulli_")
_NO_WORK = ("empty", "new_empty", "empty_like", "_unsafe_view")


@dataclass
class Counted:
    """The work of a block's training step.

    Args:
        products: (operations, bytes) of each matrix product.
        moved_bytes: read and written by everything else but attention.
        attention: (direction, [B, H, N, D] of the queries) of each call.
        kept_bytes: what the forward pass keeps for the backward pass, without parameters.
    """

    products: list[tuple[int, int]] = field(default_factory=list)
    moved_bytes: int = 0
    attention: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    kept_bytes: int = 0

    def move(self, *tensors: Tensor | None) -> None:
        """Note that a kernel reads or writes these once."""
        self.moved_bytes += sum(_num_bytes(t) for t in tensors if t is not None)


class _Operations(TorchDispatchMode):
    """Notes PyTorch's own operations."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace != "aten" or name in _NO_WORK or _is_view(func):
            return out
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if "scaled_dot_product" in name:
            # Queries come first, in the backward pass behind the output's gradient.
            direction = "backward" if name.endswith("backward") else "forward"
            queries = tensors[1 if direction == "backward" else 0]
            self.counted.attention.append((direction, tuple(queries.shape)))
            return out
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if name in _WRITE_ONLY or func._overloadname == "out":
            tensors = [t for t in tensors if all(t is not w for w in written)]
        num_bytes = sum(_num_bytes(t) for t in [*tensors, *written])
        if name in ("mm", "addmm"):
            left, right = tensors[-2:]
            self.counted.products.append((2 * left.numel() * right.shape[1], num_bytes))
        else:
            self.counted.moved_bytes += num_bytes
        return out


def count_original(block: nn.Module, images: int, tokens: int) -> Counted:
    """The block as its library wrote it.

    Args:
        block: made by `without_memory`.
        images: B.
        tokens: N of each.
    """
    return _count(block, lambda x: block(x), images, tokens)


def count_accelerated(block: nn.Module, images: int, tokens: int) -> Counted:
    """The block with halves that own their memory, in kernels of ours, on the samples it keeps.

    Args:
        block: made by `without_memory`; stays accelerated.
        images: B.
        tokens: N of each.
    """
    accelerate(block)
    assert isinstance(block, FastBlock)
    counted = Counted()

    def run(x: Tensor) -> Tensor:
        pack, halves = Pack.from_groups([(images, tokens)]), type(block).halves(block)
        return block._run(halves, ("owned", "owned"), x, pack).view(x.shape)

    with _stand_ins(counted):
        return _count(block, run, images, tokens, counted)


@contextlib.contextmanager
def without_memory() -> Generator[None]:
    """Tensors made inside have shapes and types but no values."""
    with FakeTensorMode():
        yield


def _count(
    block: nn.Module, run: Any, images: int, tokens: int, counted: Counted | None = None
) -> Counted:
    counted = Counted() if counted is None else counted
    width = next(block.parameters()).shape[0]
    assert block.training
    x, incoming = (torch.empty(images, tokens, width) for _ in range(2))
    x.requires_grad_()
    outputs: list[Tensor] = []

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(run(x))
        return outputs[0]

    with _Operations(counted):
        counted.kept_bytes = saved_bytes(block, forward)
        outputs[0].backward(incoming)
    return counted


def _num_bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements."""
    sizes = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return functools.reduce(int.__mul__, sizes, 1) * tensor.element_size()


def _is_view(func: Any) -> bool:
    """Whether an operation returns its input's memory and writes nothing."""
    infos = [value.alias_info for value in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


@contextlib.contextmanager
def _stand_ins(counted: Counted) -> Iterator[None]:
    """Our kernels replaced by what counts their bytes, and choices as a GPU makes them."""
    stand_ins = _StandIns(counted)

    def draw(pack: Pack, drop_ratio: float, generator: Any) -> KeptRows:
        ((images, tokens),) = pack.groups
        kept = Pack.from_groups([(keep_count(images, drop_ratio), tokens)])
        rows = torch.empty(kept.num_tokens, dtype=torch.int64)
        return KeptRows(rows=rows, row_scale=torch.empty(kept.num_tokens), pack=kept)

    names = [name for name in vars(_StandIns) if not name.startswith("_")]
    with (
        mock.patch.multiple(residual_branch, **{n: getattr(stand_ins, n) for n in names}),
        mock.patch.object(residual_branch, "_rebuilds", return_value=False),
        mock.patch.object(residual_branch, "backward_reads_lse", return_value=True),
        mock.patch.object(_matmul, "has_fast_bfloat16", return_value=True),
        mock.patch.object(half_block, "draw_kept_rows", draw),
    ):
        yield


class _StandIns:
    """What each kernel reads and writes; see `dinov2_fast.ops` for the arguments."""

    def __init__(self, counted: Counted) -> None:
        self._counted = counted

    def layer_norm_forward(
        self, x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, rows: Any, out_dtype: Any
    ) -> tuple[Tensor, Tensor]:
        selected = _rows(x, rows)
        y = torch.empty_like(selected, dtype=out_dtype or x.dtype)
        rstd = y.new_empty(len(y), dtype=torch.float32)
        self._counted.move(selected, rows, weight, bias, y, rstd)
        return y, rstd

    def layer_norm_backward_(
        self,
        dx: Tensor,
        dy: Tensor,
        y: Tensor,
        rstd: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        rows: Any,
        normalised: Any,
    ) -> tuple[Tensor, Tensor]:
        selected = _rows(dx, rows)
        sums = torch.empty_like(weight), torch.empty_like(bias)
        self._counted.move(selected, selected, rows, dy, y, rstd, weight, bias, *sums)
        return sums

    def scatter_add_scaled_(
        self, x: Tensor, residual: Tensor, rows: Any, row_scale: Any, gamma: Any
    ) -> None:
        selected = _rows(x, rows)
        self._counted.move(selected, selected, residual, rows, row_scale, gamma)

    def gather_scaled(
        self, dx: Tensor, rows: Any, row_scale: Any, *, out_dtype: Any
    ) -> tuple[Tensor, Tensor]:
        selected = _rows(dx, rows)
        g = torch.empty_like(selected, dtype=out_dtype)
        sums = dx.new_empty(dx.shape[1])
        self._counted.move(selected, rows, row_scale, g, sums)
        return g, sums

    def gelu(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self._counted.move(x, out)
        return out

    def gelu_backward_(self, da: Tensor, x: Tensor) -> Tensor:
        sums = x.new_empty(x.shape[1], dtype=torch.float32)
        self._counted.move(da, x, da, x, sums)  # both are overwritten
        return sums

    def swiglu(self, x12: Tensor) -> Tensor:
        out = x12.new_empty(x12.shape[0], x12.shape[1] // 2)
        self._counted.move(x12, out)
        return out

    swiglu_backward_ = gelu_backward_

    def attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, pack: Pack, *, scale: float, q_pack: Any
    ) -> tuple[Tensor, Tensor]:
        self._note_attention("forward", q, pack)
        return torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[1], q.shape[0])

    def attention_backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, pack: Pack, **given: Any
    ) -> None:
        self._note_attention("backward", q, pack)

    def _note_attention(self, direction: str, q: Tensor, pack: Pack) -> None:
        ((count, length),) = pack.groups
        self._counted.attention.append((direction, (count, q.shape[1], length, q.shape[2])))


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """As many rows as a kernel touches."""
    return x if rows is None else x[: len(rows)]
