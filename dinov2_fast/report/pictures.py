"""What the network saw and found, as images: crops with masks, components, neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dinov2_fast.data.augmentation import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from PIL import Image

MASK_COLOR = (128, 120, 158)
"""Colour laid over masked patches; neither dark nor light, so that it shows on both."""
_MASK_OPACITY = 0.85


def to_picture(crop: Tensor) -> Image.Image:
    """A normalised crop as the picture it was before.

    Args:
        crop: [3, H, W] fp32, ImageNet mean and standard deviation.
    """
    from PIL import Image

    pixels = crop.detach().cpu().float() * torch.tensor(IMAGENET_STD)[:, None, None]
    pixels = (pixels + torch.tensor(IMAGENET_MEAN)[:, None, None]).mul(255).round().clamp(0, 255)
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def shade_masked(picture: Image.Image, mask: Tensor, grid: tuple[int, int]) -> Image.Image:
    """The picture with its masked patches shaded, faintly see-through.

    Args:
        picture: RGB, sides multiples of the grid's.
        mask: [N] bool, patches in row-major order.
        grid: rows and columns of patches.
    """
    from PIL import Image

    rows, columns = grid
    cells = mask.cpu().view(rows, columns).numpy()
    tall, wide = picture.height // rows, picture.width // columns
    hidden = np.kron(cells, np.ones((tall, wide), dtype=bool))[..., None]
    pixels = np.asarray(picture, dtype=np.float64)
    shaded = (1 - _MASK_OPACITY) * pixels + _MASK_OPACITY * np.array(MASK_COLOR)
    return Image.fromarray(np.where(hidden, shaded, pixels).round().astype(np.uint8))


def component_picture(colors: Tensor) -> Image.Image:
    """Colours of patches as a picture, one pixel a patch.

    Args:
        colors: [h, w, 3] in [0, 1].
    """
    from PIL import Image

    return Image.fromarray(colors.mul(255).round().to(torch.uint8).numpy())


def center_crop(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The largest centred part of the aspect ratio width : height, resized to it.

    Args:
        picture: RGB.
        width: of the result in pixels.
        height: of the result in pixels.
    """
    from PIL import ImageOps

    return ImageOps.fit(picture, (width, height))


def thumbnail(picture: Image.Image, side: int) -> Image.Image:
    """The picture within a square of `side` pixels, its aspect ratio kept; never enlarged."""
    small = picture.copy()
    small.thumbnail((side, side))
    return small
