"""Stochastic depth as a module, for residual branches that somebody writes themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast.nn.input_forms import as_packed, run_as_one_pack
from dinov2_fast.ops.stochastic_depth import draw_kept_rows, gather_rows, scatter_add_scaled
from dinov2_fast.packing import Pack


class DropPath(nn.Module):
    """Drop a residual branch for some samples; no parameters.

    Args:
        drop_prob: share of samples that skip the branch in training, in [0, 1); None is 0.
    Raises:
        ValueError: a share outside [0, 1).
    Source: "Deep Networks with Stochastic Depth", arXiv 1603.09382; DINOv2 paper, section 5.
    """

    def __init__(self, drop_prob: float | None = None) -> None:
        super().__init__()
        self.drop_prob = drop_prob or 0.0
        if not 0 <= self.drop_prob < 1:
            raise ValueError(f"DropPath: expected drop_prob in [0, 1), got {drop_prob}")

    def forward(self, x: Tensor | Sequence[Tensor], pack: Pack | None = None) -> Any:
        """Zero a branch's output for samples drawn one by one, and scale up the others.

        Args:
            x: [B, ...] output of a branch, which was computed for every sample; [T, C] with a pack,
                or a list of [B_i, N_i, C].
            pack: layout of [T, C], whose samples are its sequences.
        Returns:
            The shape of x, a list for a list.
        """
        if not isinstance(x, Tensor):
            return run_as_one_pack(self.forward, x, pack, name="drop_path")
        if pack is not None:
            x = as_packed(x, pack, name="drop_path")[0]
        if not self.training or self.drop_prob == 0:
            return x
        num_samples = len(x) if pack is None else pack.num_sequences
        kept = torch.rand(num_samples, device=x.device) >= self.drop_prob
        if pack is None:
            kept = kept.view(-1, *[1] * (x.ndim - 1))
        else:  # with the length told, nobody waits for the device to count tokens
            kept = kept.repeat_interleave(pack.offsets.diff(), output_size=len(x)).unsqueeze(1)
        return x * kept.to(x.dtype) / (1 - self.drop_prob)

    def add(
        self,
        x: Tensor | Sequence[Tensor],
        branch: Callable[..., Tensor],
        pack: Pack | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Any:
        """`x + branch(x)`, the branch computed for the samples it is kept for and no others.

        Args:
            x: [B, N, C] tokens, [T, C] with a pack, or a list of [B_i, N_i, C].
            branch: maps [m, N, C], m of the B samples, to the same shape; for a pack or a list it
                is called once, as `branch(tokens, pack)` with the kept [R, C] and their pack.
            pack: layout of [T, C], of whose groups each draws its own samples.
            generator: CPU generator of the draw; None draws from torch's global one.
        Returns:
            The shape of x, a list for a list. With m of B samples kept, kept ones receive B / m
            times the branch.
        """
        if not isinstance(x, Tensor):
            return run_as_one_pack(
                lambda tokens, layout: self.add(tokens, branch, layout, generator=generator),
                x,
                pack,
                name="drop_path",
            )
        tokens, layout = as_packed(x, pack, name="drop_path")
        kept = draw_kept_rows(layout, self.drop_prob if self.training else 0.0, generator)
        if kept is None:
            return x + (branch(x) if pack is None else branch(x, pack))
        rows = gather_rows(tokens, kept.rows)  # [R, C]
        if pack is None:
            residual = branch(rows.view(-1, *x.shape[1:])).flatten(0, 1)
        else:
            residual = branch(rows, kept.pack)
        return scatter_add_scaled(tokens, residual, kept.rows, kept.row_scale, None).view(x.shape)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"drop_prob={self.drop_prob}"
