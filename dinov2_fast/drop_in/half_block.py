"""One residual half of somebody else's transformer block, described so that it can run faster.

A half is `x + drop_path(layer_scale(inner(norm(x))))`. It runs on one of three paths: as an
autograd node that owns its memory; with its own modules on the samples that drop path keeps; or
with its own modules as its library wrote it, whenever something in it is not what it seems or the
batch is too small for anything else to pay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov2_fast import environment
from dinov2_fast.backends import choose_backend
from dinov2_fast.drop_in import limits
from dinov2_fast.nn.branch_plan import BranchPlan, Recompute
from dinov2_fast.nn.module_calls import compute_dtype, has_hooks
from dinov2_fast.nn.residual_branch import AttentionBranch, FeedForwardBranch
from dinov2_fast.ops.stochastic_depth import KeptRows, draw_kept_rows, keep_count
from dinov2_fast.packing import Pack

DropPathMode = Literal["subset", "masked"]
Path = Literal["library", "skipping", "owned"]

Part = tuple[str, nn.Module, frozenset[str]]
"""Name, module and the full names of the types whose arithmetic is known."""

_PLAIN_TYPES = (torch.float32, torch.bfloat16)  # of activations, in the native kernels


@dataclass(frozen=True)
class Options:
    """How accelerated blocks run.

    Args:
        drop_path: `subset` draws a fixed number of samples that each half keeps, `masked` asks the
            library's own drop path for every sample.
        recompute: see `nn.Block`.
    """

    drop_path: DropPathMode = "subset"
    recompute: Recompute = "none"


@dataclass(frozen=True)
class HalfBlock:
    """The modules of one half and what they compute.

    Args:
        kind: `attention`, or the feed-forward layer's activation, `gelu` or `swiglu`.
        norm: in front.
        first: layers whose outputs, side by side, are q, k, v, or the hidden layer (for swiglu
            gate and value).
        second: layer behind attention or activation.
        gamma: [C] LayerScale factors; None for 1.
        layer_scale: the module that holds them.
        drop_path: the module that drops samples.
        drop_ratio: share of samples it drops in training.
        inner: norm's output to the half's output before `layer_scale`, by the library's modules.
        parts: every module of the half, none of which the owned path calls.
        difference: why the half computes something else than the owned path; "" if it does not.
        num_heads: H, of attention.
        head_dim: D, of attention.
        idle_hooks: name of the Python module whose forward hooks have nothing to do in a call that
            comes this far.
    """

    kind: Literal["attention", "gelu", "swiglu"]
    norm: nn.LayerNorm
    first: tuple[nn.Linear, ...]
    second: nn.Linear
    gamma: Tensor | None
    layer_scale: nn.Module
    drop_path: nn.Module
    drop_ratio: float
    inner: Callable[[Tensor], Tensor]
    parts: tuple[Part, ...]
    difference: str = ""
    num_heads: int = 1
    head_dim: int = 1
    idle_hooks: str = ""

    def why_left(self) -> str:
        """Why the half must run as its library wrote it, or ""."""
        for name, module, types in self.parts:
            if full_name(type(module)) not in types:
                return f"{name} is a {full_name(type(module))}"
            if has_hooks(module, idle=self.idle_hooks):
                return f"{name} has a hook or a forward of its own"
            if is_rewritten(type(module)):
                return f"{name} computes by a forward that is not its library's"
            if isinstance(module, nn.Dropout) and module.p > 0:
                return f"{name} drops {module.p:g} of its inputs"
        if self.norm.bias is None or self.norm.weight is None:
            return "its norm has no weight or bias"
        return self.difference

    def is_differentiated(self, x: Tensor) -> bool:
        """Whether a backward pass may come."""
        if not torch.is_grad_enabled():
            return False
        modules = (self.norm, *self.first, self.second, self.layer_scale)
        return x.requires_grad or any(p.requires_grad for m in modules for p in m.parameters())

    def drops(self) -> bool:
        """Whether samples are dropped: in training."""
        return self.drop_path.training and self.drop_ratio > 0

    def why_not_owned(self, x: Tensor) -> str:
        """Why the half cannot be an autograd node that owns its memory, or "".

        Args:
            x: the residual stream; its device and type decide.
        """
        parameters = (self.norm.weight, self.norm.bias, self.second.weight, self.first[0].weight)
        for tensor in (x, *parameters):
            if type(tensor) not in (Tensor, nn.Parameter):
                return f"tensors of type {type(tensor).__name__}"
            if tensor.dtype != torch.float32:
                return f"parameters or tokens in {str(tensor.dtype).removeprefix('torch.')}"
        dtype = compute_dtype(x)
        if dtype is not None and dtype not in _PLAIN_TYPES:
            return f"autocast to {str(dtype).removeprefix('torch.')}"
        for op in ("layer_norm", "stochastic_depth", self.kind):
            if choose_backend(op, x, None) == "reference":
                return f"{op} has no kernel that is measured on {x.device.type}"
        return ""

    def path(self, x: Tensor, options: Options) -> Path:
        """How the half runs on these tokens: see the head of this file.

        Args:
            x: [B, N, C] tokens.
            options: of the model.
        """
        if self.why_left():
            return "library"
        least, size = limits.limits_of(x), (x.shape[0] * x.shape[1], x.shape[2])
        # Checkpointing may run a half first without gradients: it must draw the same samples.
        wanted = least.without_gradients or self.drops() or self.is_differentiated(x)
        if least.owned_pays(*size) and wanted and not self.why_not_owned(x):
            return "owned"
        ratio = self.drop_ratio if self.drops() else 0.0
        dropped = dropped_ratio(ratio, x.shape[0], options.drop_path)
        return "skipping" if least.skipping_pays(*size, dropped) else "library"

    def run(self, x: Tensor, pack: Pack, shape: torch.Size, path: Path, options: Options) -> Tensor:
        """Add the half to the stream.

        Args:
            x: [T, C] tokens in a buffer that may be overwritten.
            pack: layout of x.
            shape: [B, N, C] for the library's modules, which `owned` does not use.
            path: how.
            options: of the model.
        Returns:
            [T, C], x itself on the owned path.
        """
        if path == "library":
            return self.plain(x.view(shape)).view(x.shape)
        kept = self._kept_rows(x, pack, options)
        if path == "owned":
            return self._run_owned(x, pack, kept, options.recompute)
        tokens = x if kept is None else x.index_select(0, kept.rows)  # [R, C]
        branch = self.layer_scale(self.inner(self.norm(tokens.view(-1, *shape[1:])))).flatten(0, 1)
        if kept is None:
            return x + branch
        update = branch * kept.row_scale.to(branch.dtype).unsqueeze(1)
        return x.index_add(0, kept.rows, update.to(x.dtype))

    def plain(self, x: Tensor) -> Tensor:
        """The half as its library computes it: [B, N, C] -> [B, N, C]."""
        return x + self.drop_path(self.layer_scale(self.inner(self.norm(x))))

    def _kept_rows(self, x: Tensor, pack: Pack, options: Options) -> KeptRows | None:
        """The samples that drop path keeps, drawn from torch's global generators; None is all."""
        if not self.drops():
            return None
        if options.drop_path == "subset":
            if all(keep_count(count, self.drop_ratio) == count for count, _ in pack.groups):
                return None
            return draw_kept_rows(pack, self.drop_ratio, None)
        factors = self.drop_path(x.new_ones(pack.num_sequences, 1, 1)).flatten()  # [S]
        return rows_of_factors(factors, pack)

    def _run_owned(
        self, x: Tensor, pack: Pack, kept: KeptRows | None, recompute: Recompute
    ) -> Tensor:
        """The half as one autograd node; changes x."""
        plan = BranchPlan(
            pack=pack if kept is None else kept.pack,
            kept=kept,
            eps=self.norm.eps,
            dtype=compute_dtype(x),
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            swiglu=self.kind == "swiglu",
            recompute=recompute,
        )
        branch = AttentionBranch if self.kind == "attention" else FeedForwardBranch
        out = branch.apply(
            x,
            self.norm.weight,
            self.norm.bias,
            *_side_by_side(self.first),
            self.second.weight,
            self.second.bias,
            self.gamma,
            plan,
        )
        return cast(Tensor, out)


class Entrance(torch.autograd.Function):
    """A copy of a block's input, in which the block adds up its stream.

    On the way back it takes the mark off the stream's gradient, so that blocks below copy it: an
    intermediate output's gradient may be held by somebody (`retain_grad`, a tensor hook).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """[..., C] -> contiguous [T, C]."""
        ctx.shape = x.shape
        tokens = x.new_empty(x.numel() // x.shape[-1], x.shape[-1])  # no view: branches write to it
        tokens.view(x.shape).copy_(x)
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient in the input's shape, as a tensor object of its own."""
        return grad.detach().reshape(ctx.shape)


def dropped_ratio(drop_ratio: float, batch_size: int, mode: DropPathMode) -> float:
    """Share of a batch's samples that a half need not be computed for, on average.

    Args:
        drop_ratio: share that the library's drop path drops.
        batch_size: B.
        mode: of `Options`.
    """
    if mode == "masked" or not 0 < drop_ratio < 1:  # halves that drop everything are left
        return drop_ratio
    return 1 - keep_count(batch_size, drop_ratio) / max(batch_size, 1)


def rows_of_factors(factors: Tensor, pack: Pack) -> KeptRows:
    """The kept rows that stand for a factor per sample, 0 for those left out.

    Args:
        factors: [S] what drop path multiplies each sample with.
        pack: layout of the stream.
    Returns:
        Rows of the samples whose factor is not zero; how many there are is read on the host.
    """
    kept = factors.nonzero().flatten()  # [m]
    lengths = torch.tensor(pack.lengths, device=kept.device)[kept]
    begins = pack.offsets[kept].long()
    before = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    within = torch.arange(len(before), device=kept.device) - before
    return KeptRows(
        rows=begins.repeat_interleave(lengths) + within,
        row_scale=factors[kept].float().repeat_interleave(lengths),
        pack=Pack.from_lengths(lengths.tolist(), pack.device),
    )


def full_name(kind: type) -> str:
    """Module and name of a type."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_rewritten(kind: type[nn.Module]) -> bool:
    """Whether somebody else's function has taken the place of a class's own `forward`."""
    written_in = getattr(kind.forward, "__module__", "")
    if written_in == kind.__module__:  # nearly always
        return False
    return all(base.__module__ != written_in for base in kind.__mro__)


def transforms_are_active() -> bool:
    """Whether functorch's transforms or forward-mode derivatives run, in need of plain steps."""
    if torch._C._are_functorch_transforms_active():
        return True
    return torch.autograd.forward_ad._current_level >= 0


def runs_plainly() -> bool:
    """Whether every block must run as its library wrote it: transforms, the user."""
    return transforms_are_active() or environment.plain_blocks()


def _side_by_side(layers: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one layer whose output is that of all, side by side."""
    if len(layers) == 1:
        return layers[0].weight, layers[0].bias
    weight = torch.cat([layer.weight for layer in layers])
    if layers[0].bias is None:
        return weight, None
    return weight, torch.cat([layer.bias for layer in layers])
