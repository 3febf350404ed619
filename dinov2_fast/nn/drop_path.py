"""Stochastic depth as a module, for residual branches that somebody writes themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

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

    def forward(self, x: Tensor) -> Tensor:
        """Zero a branch's output for samples drawn one by one, and scale up the others.

        Args:
            x: [B, ...] output of a branch, which was computed for every sample.
        Returns:
            The shape of x.
        """
        if not self.training or self.drop_prob == 0:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.drop_prob
        return x * kept.to(x.dtype) / (1 - self.drop_prob)

    def add(
        self,
        x: Tensor,
        branch: Callable[[Tensor], Tensor],
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`x + branch(x)`, the branch computed for the samples it is kept for and no others.

        Args:
            x: [B, N, C] tokens.
            branch: maps [m, N, C], m of the B samples, to the same shape.
            generator: CPU generator of the draw; None draws from torch's global one.
        Returns:
            [B, N, C]. With m of B samples kept, kept ones receive B / m times the branch.
        """
        pack = Pack.from_groups([(x.shape[0], x.shape[1])], x.device)
        kept = draw_kept_rows(pack, self.drop_prob if self.training else 0.0, generator)
        if kept is None:
            return x + branch(x)
        tokens = x.flatten(0, 1)  # [T, C]
        residual = branch(gather_rows(tokens, kept.rows).view(-1, *x.shape[1:])).flatten(0, 1)
        return scatter_add_scaled(tokens, residual, kept.rows, kept.row_scale, None).view(x.shape)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"drop_prob={self.drop_prob}"
