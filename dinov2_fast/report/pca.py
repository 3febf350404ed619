"""The picture of patch features that DINOv2 is known for: principal components as colours."""

from __future__ import annotations

import torch
from torch import Tensor

# Colours span the middle 98 % of a component: one stray patch must not grey out all others.
_LOW_QUANTILE, _HIGH_QUANTILE = 0.01, 0.99


def pca_rgb(
    patch_tokens: Tensor, grid: tuple[int, int], *, remove_background: bool = True
) -> tuple[Tensor, Tensor]:
    """Three principal components of patch features as red, green and blue.

    1. A PCA over the centred patches of all images together gives each patch a score on the first
       component.
    2. Patches with a positive score are foreground. A component has no sign of its own; it is
       turned so that the mean score of patches at the border of the images is not above that of
       the others, since what a photographer wants to show is rarely at the edge.
    3. A second PCA over the foreground patches alone gives three scores. Each is turned so that
       the entry of its axis with the largest magnitude is positive, and scaled so that the
       1st and 99th percentile become 0 and 1.

    Args:
        patch_tokens: [B, N, C] features of the patches of B images in row-major order, best of
            images that show things of one kind: they share the axes, so equal colours mean equal
            features.
        grid: rows h and columns w of patches; h * w = N.
        remove_background: False skips the first PCA and takes every patch as foreground.

    Returns:
        Colours [B, h, w, 3] fp32 in [0, 1], black outside the foreground, and the foreground
        [B, h, w] bool; both on the CPU.

    Raises:
        ValueError: another shape, or features that are not finite.

    Source: DINOv2 paper, section 7.4 "PCA of patch features" and figures 1 and 9.
    """
    rows, columns = grid
    if patch_tokens.ndim != 3 or patch_tokens.shape[1] != rows * columns:
        raise ValueError(
            f"pca_rgb: patch_tokens must be [B, {rows * columns}, C] for a grid of {rows} x "
            f"{columns}, got {tuple(patch_tokens.shape)}; leave out CLS and registers"
        )
    tokens = patch_tokens.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(tokens).all()):
        raise ValueError("pca_rgb: patch_tokens must be finite, got nan or inf")
    num_images, num_patches, channels = tokens.shape
    tokens = tokens.reshape(num_images * num_patches, channels)  # [B * N, C]
    border = _border(rows, columns).repeat(num_images)
    foreground = torch.ones(len(tokens), dtype=torch.bool)
    if remove_background:
        scores = _components(tokens, 1)[:, 0]
        inside = ~border
        if bool(inside.any()) and scores[border].mean() > scores[inside].mean():
            scores = -scores
        foreground = scores > 0
    colors = torch.zeros(len(tokens), 3)
    if bool(foreground.any()):
        colors[foreground] = _unit_range(_components(tokens[foreground], 3)).float()
    return (
        colors.view(num_images, rows, columns, 3),
        foreground.view(num_images, rows, columns),
    )


def _components(points: Tensor, count: int) -> Tensor:
    """Scores [R, count] of points [R, C] on the axes of largest variance; zeros beyond rank."""
    centered = points - points.mean(dim=0)
    variances, axes = torch.linalg.eigh(centered.T @ centered)  # ascending
    # Rounding gives constant points tiny variances; their axes mean nothing.
    noise = torch.finfo(points.dtype).eps * len(points) * points.square().sum()
    axes = axes.flip(1)[:, :count] * (variances.flip(0)[:count] > noise)
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    axes = torch.where(largest < 0, -axes, axes)
    scores = centered @ axes
    return torch.nn.functional.pad(scores, (0, count - scores.shape[1]))


def _unit_range(scores: Tensor) -> Tensor:
    """Each column scaled from its low and high percentile to 0 and 1; constant columns to 0.5."""
    low, high = (_quantile(scores, share) for share in (_LOW_QUANTILE, _HIGH_QUANTILE))
    span = high - low
    scaled = (scores - low) / torch.where(span > 0, span, 1.0)
    return torch.where(span > 0, scaled, 0.5).clamp(0, 1)


def _quantile(scores: Tensor, share: float) -> Tensor:
    """The value at a share of each sorted column; `torch.quantile` refuses more than 2^24 rows."""
    position = round(share * (len(scores) - 1))
    return scores.sort(dim=0).values[position]


def _border(rows: int, columns: int) -> Tensor:
    """Whether a patch lies at the edge of the image, [rows * columns] bool."""
    border = torch.ones(rows, columns, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return border.flatten()
