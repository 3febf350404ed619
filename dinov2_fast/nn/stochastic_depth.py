"""A residual branch that is computed for a random part of the samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dinov2_fast.nn.layer_norm import LayerNorm
from dinov2_fast.ops.stochastic_depth import draw_kept_rows, scatter_add_scaled
from dinov2_fast.packing import Pack

Branch = Callable[[Tensor, Pack], Tensor]


def add_branch(
    x: Tensor,
    pack: Pack,
    norm: LayerNorm,
    branch: Branch,
    gamma: Tensor | None,
    *,
    drop_ratio: float,
    generator: torch.Generator | None,
) -> Tensor:
    """`x + gamma * branch(norm(x))`, the branch computed for the kept samples of each group only.

    Args:
        x: [T, C] residual stream.
        pack: layout of x; each of its groups draws its own samples.
        norm: normalisation in front of the branch; reads only the kept rows.
        branch: maps normalised rows [R, C] and their pack to [R, C].
        gamma: [C] LayerScale factors; None for 1.
        drop_ratio: share of the samples that skip the branch; 0 takes the plain sum.
        generator: CPU generator of the draw; None draws from torch's global one.
    Returns:
        [T, C] in the dtype of x. With b samples in a group and m kept, kept ones receive b / m
        times the branch.
    Source: DINOv2 paper, section 5 "Efficient stochastic depth".
    """
    kept = draw_kept_rows(pack, drop_ratio, generator)
    if kept is None:
        residual = branch(norm(x), pack)
        return x + (residual if gamma is None else residual * gamma)
    residual = branch(norm(x, rows=kept.rows), kept.pack)  # [R, C]
    return scatter_add_scaled(x, residual, kept.rows, kept.row_scale, gamma)
