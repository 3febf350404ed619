"""Which rows a residual branch works on: the kept samples, and of these the rows somebody reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dinov2_fast.ops.stochastic_depth import KeptRows
from dinov2_fast.packing import Pack

Recompute = Literal["none", "mlp", "block"]
RECOMPUTE_LEVELS: tuple[Recompute, ...] = ("none", "mlp", "block")


@dataclass(frozen=True)
class BranchPlan:
    """What a branch needs besides tensors that may receive gradients.

    Args:
        pack: layout of the rows the branch works on (the kept ones).
        kept: the kept rows; None is all of them.
        eps: of the norm.
        dtype: what activations are stored and passed in; None is the type of the stream.
        num_heads: H, of an attention branch.
        head_dim: D, of an attention branch.
        swiglu: whether the feed-forward layer is gated.
        recompute: what the backward pass computes anew rather than keeps; modules under plain
            autograd have no plan and keep everything.
        queries: [Q] int64 positions among the rows for which attention is computed; None is all.
        query_rows: the rows of the stream they stand for, their factors and their layout.
    """

    pack: Pack
    kept: KeptRows | None
    eps: float
    dtype: torch.dtype | None
    num_heads: int = 1
    head_dim: int = 1
    swiglu: bool = False
    recompute: Recompute = "none"
    queries: Tensor | None = None
    query_rows: KeptRows | None = None

    @property
    def rows(self) -> Tensor | None:
        """Rows of the stream the branch works on; None is all of them."""
        return None if self.kept is None else self.kept.rows

    @property
    def output(self) -> tuple[Tensor | None, Tensor | None]:
        """Rows the branch adds to and their factors; None is all of them, and 1."""
        added = self.kept if self.query_rows is None else self.query_rows
        return (None, None) if added is None else (added.rows, added.row_scale)


def wanted_queries(plan: BranchPlan, wanted: Tensor, num_rows: int) -> BranchPlan:
    """An attention branch that computes queries, and adds, for some rows only; keys stay all.

    Reads lengths on the host, so it is for the CPU.

    Args:
        plan: of the whole branch.
        wanted: [W] int64 rows of the stream, none twice.
        num_rows: T, rows of the stream.
    Returns:
        The plan for the wanted rows among the kept ones; every other row of the stream stays as it
        is.
    """
    rows, scale = _rows_of(plan, num_rows, wanted.device)
    chosen = _membership(wanted, num_rows)[rows]  # [R]
    queries = chosen.nonzero().flatten()  # [Q]
    before = torch.cat([chosen.new_zeros(1, dtype=torch.int64), chosen.cumsum(0)])
    lengths = before[plan.pack.offsets.long()].diff().tolist()
    pack = Pack.from_lengths(lengths, wanted.device)
    return replace(plan, queries=queries, query_rows=KeptRows(rows[queries], scale[queries], pack))


def wanted_rows(plan: BranchPlan, wanted: Tensor, num_rows: int) -> BranchPlan:
    """A branch without attention that works on some rows of the stream only.

    Args:
        plan: of the whole branch.
        wanted: [W] int64 rows of the stream, none twice.
        num_rows: T, rows of the stream.
    Returns:
        The plan for the wanted rows among the kept ones.
    """
    rows, scale = _rows_of(plan, num_rows, wanted.device)
    chosen = _membership(wanted, num_rows)[rows]
    pack = Pack.from_groups([(int(chosen.sum()), 1)], wanted.device)  # rows stand alone here
    return replace(plan, pack=pack, kept=KeptRows(rows[chosen], scale[chosen], pack))


def _rows_of(plan: BranchPlan, num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of the stream a branch works on, and their factors."""
    if plan.kept is not None:
        return plan.kept.rows, plan.kept.row_scale
    return torch.arange(num_rows, device=device), torch.ones(num_rows, device=device)


def _membership(wanted: Tensor, num_rows: int) -> Tensor:
    """Whether each of the stream's rows is wanted: [T] bool."""
    flags = torch.zeros(num_rows, dtype=torch.bool, device=wanted.device)
    flags[wanted] = True
    return flags
