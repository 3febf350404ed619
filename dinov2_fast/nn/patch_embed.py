"""Images to patch tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast.nn.input_forms import check_list, run_token_by_token
from dinov2_fast.ops._matmul import autocast_linear


class PatchEmbed(nn.Module):
    """Cut images into square patches and map each to a vector.

    Args:
        img_size: side of an image in pixels, or height and width: `num_patches` is of such a one.
            Images of other sizes are embedded just as well.
        patch_size: side of a patch in pixels, or the same twice.
        in_chans: channels of the image.
        embed_dim: C, channels of a token.
        norm_layer: makes a norm of embed_dim for the tokens; None leaves it out.
        flatten_embedding: False gives [B, rows, columns, C].
    Raises:
        ValueError: patches that are not square.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten_embedding: bool = True,
    ) -> None:
        super().__init__()
        height, width = (patch_size,) * 2 if isinstance(patch_size, int) else patch_size
        if height != width:
            raise ValueError(
                f"patch_embed: expected patch_size to be the side of a square, got {patch_size}"
            )
        self.patch_size, self.flatten_embedding = height, flatten_embedding
        sides = (img_size,) * 2 if isinstance(img_size, int) else img_size
        self.num_patches = (sides[0] // height) * (sides[1] // height)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=height, stride=height)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

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

    def forward(self, x: Tensor | Sequence[Tensor]) -> Any:
        """Embed images.

        Args:
            x: [B, in_chans, H, W], H and W multiples of the patch size; or a list of such batches,
                each of a size of its own, embedded by one product.
        Returns:
            [B, N, C], patches in row-major order, a list for a list.
        Raises:
            TypeError: neither a tensor nor a list of tensors.
            ValueError: not such batches of images.
        """
        if not isinstance(x, Tensor):
            check_list(x, None, name="patch_embed")
            grids = [self._grid_of_images(images) for images in x]
            patches = [self._patches(*pair) for pair in zip(x, grids, strict=True)]
            tokens = run_token_by_token(self._embed_patches, patches, None, name="patch_embed")
            return [self._shaped(*pair) for pair in zip(tokens, grids, strict=True)]
        grid = self._grid_of_images(x)
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # PyTorch's convolution has no fast form for bfloat16.
            return self._shaped(self._embed_patches(self._patches(x, grid)), grid)
        tokens = self.proj(x).flatten(2).transpose(1, 2)  # [B, C, rows, columns] -> [B, N, C]
        return self._shaped(self.norm(tokens), grid)

    def _grid_of_images(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of patches, if x is a batch of images."""
        if x.ndim != 4 or x.shape[1] != self.proj.in_channels:
            raise ValueError(
                f"patch_embed: expected images [B, {self.proj.in_channels}, H, W], "
                f"got {tuple(x.shape)}"
            )
        return self.grid_of(x.shape[2], x.shape[3])

    def _patches(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The pixels of each patch: [B, N, in_chans * P * P]."""
        rows, columns = grid
        p = self.patch_size
        patches = x.reshape(x.shape[0], x.shape[1], rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(x.shape[0], rows * columns, x.shape[1] * p * p)

    def _embed_patches(self, patches: Tensor) -> Tensor:
        """The convolution as one product, and the norm: [..., in_chans * P * P] to [..., C]."""
        return self.norm(autocast_linear(patches, self.proj.weight.flatten(1), self.proj.bias))

    def _shaped(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, N, C], or [B, rows, columns, C]."""
        return tokens if self.flatten_embedding else tokens.unflatten(1, grid)
