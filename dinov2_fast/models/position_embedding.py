"""Position embeddings for images of any size."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

ResizeMode = Literal["official", "antialias"]
RESIZE_MODES: tuple[ResizeMode, ...] = ("official", "antialias")

# Published models without registers were trained with the factor (n + 0.1) / M instead of n / M.
# It reaches the sampling grid, so it moves every value and not only the rounding of the size.
OFFICIAL_OFFSET = 0.1


def resize_position_embedding(
    pos_embed: Tensor, grid: tuple[int, int], *, mode: ResizeMode
) -> Tensor:
    """Position embeddings of a grid of patches; differentiable.

    Args:
        pos_embed: [1, 1 + M * M, C], that of CLS first.
        grid: rows and columns of patches in the image.
        mode: `official` samples bicubically with the factor (n + 0.1) / M and without
            antialiasing; `antialias` goes by size, with antialiasing.
    Returns:
        [1, 1 + rows * columns, C] in the dtype of pos_embed; pos_embed itself when the grid is the
        stored one.
    Source: DINOv2's published models without (official) and with registers (antialias).
    """
    side = math.isqrt(pos_embed.shape[1] - 1)
    if grid == (side, side):
        return pos_embed
    # Half precision shifts bicubic samples; float64 keeps its own precision. The view stays
    # channels-last: torch's antialiased CPU resize of contiguous maps to one column is wrong.
    dtype = torch.promote_types(pos_embed.dtype, torch.float32)
    patches = pos_embed[:, 1:].to(dtype).unflatten(1, (side, side)).permute(0, 3, 1, 2)
    # Torch sums the gradient of a bicubic resize in any order on a GPU; products have one order.
    if torch.are_deterministic_algorithms_enabled():
        with torch.autocast(patches.device.type, enabled=False):
            rows, columns = (_weights(patches, length, mode) for length in grid)
            resized = rows @ patches @ columns.mT
    else:
        resized = _resized(patches, grid, mode)
    assert tuple(resized.shape[2:]) == grid, (tuple(resized.shape), grid)
    resized = resized.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # [1, rows * columns, C]
    return torch.cat([pos_embed[:, :1], resized], dim=1)


def _resized(maps: Tensor, grid: tuple[int, int], mode: ResizeMode) -> Tensor:
    """Maps [B, C, height, width] of another size, by torch."""
    if mode != "official":
        return F.interpolate(maps, size=grid, mode="bicubic", antialias=True)
    factors = [(n + OFFICIAL_OFFSET) / side for n, side in zip(grid, maps.shape[2:], strict=True)]
    return F.interpolate(maps, scale_factor=factors, mode="bicubic")


def _weights(maps: Tensor, length: int, mode: ResizeMode) -> Tensor:
    """What each of the new rows takes of the rows of square maps: [length, side]."""
    side = maps.shape[2]
    one_row_each = torch.eye(side, dtype=maps.dtype, device=maps.device)
    constant = one_row_each.view(1, side, side, 1).expand(1, side, side, side)
    return _resized(constant, (length, side), mode)[0, :, :, 0].T
