"""Images to patch tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2_fast.ops._matmul import autocast_linear


class PatchEmbed(nn.Module):
    """Cut images into square patches and map each to a vector.

    Args:
        patch_size: side of a patch in pixels.
        in_channels: channels of the image.
        embed_dim: C, channels of a token.
    """

    def __init__(self, *, patch_size: int = 14, in_channels: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image.

        Args:
            height: pixels.
            width: pixels.
        Returns:
            Patches along the height and along the width.
        Raises:
            ValueError: a side is not a positive multiple of the patch size.
        """
        p = self.patch_size
        if height % p or width % p or height < p or width < p:
            fitting = " x ".join(str(max(p, (side + p // 2) // p * p)) for side in (height, width))
            raise ValueError(
                f"patch_embed: expected height and width to be multiples of the patch size {p}, "
                f"got {height} x {width}; resize or pad to {fitting}"
            )
        return height // p, width // p

    def forward(self, x: Tensor) -> Tensor:
        """Embed images x [B, in_channels, H, W].

        Args:
            x: [B, in_channels, H, W], H and W multiples of the patch size.
        Returns:
            [B, N, C], patches in row-major order.
        Raises:
            ValueError: not such a batch of images.
        """
        if x.ndim != 4 or x.shape[1] != self.proj.in_channels:
            raise ValueError(
                f"patch_embed: expected images [B, {self.proj.in_channels}, H, W], "
                f"got {tuple(x.shape)}"
            )
        rows, columns = self.grid_of(x.shape[2], x.shape[3])
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            return self._as_product(x, rows, columns)
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, C, rows, columns] -> [B, N, C]

    def _as_product(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """The convolution as one matrix product: PyTorch's has no fast form for bfloat16."""
        p = self.patch_size
        patches = x.view(x.shape[0], x.shape[1], rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(x.shape[0], rows * columns, -1)  # [B, N, in_channels * P * P]
        return autocast_linear(patches, self.proj.weight.flatten(1), self.proj.bias)
