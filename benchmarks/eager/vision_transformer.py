"""A ViT as eager implementations write it: every residual branch computes every sample."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OFFICIAL_OFFSET = 0.1  # published DINOv2 resizes positions by the factor (n + 0.1) / M


class DropPath(nn.Module):
    """Computes a branch for all samples and multiplies that of some by zero.

    Args:
        drop_ratio: probability of dropping a sample.
    """

    def __init__(self, drop_ratio: float) -> None:
        super().__init__()
        self.drop_ratio = drop_ratio

    def forward(self, x: Tensor) -> Tensor:
        """Mask a branch x [B, N, C]; the samples kept are scaled up."""
        if self.drop_ratio == 0 or not self.training:
            return x
        keep_ratio = 1 - self.drop_ratio
        kept = torch.rand(x.shape[0], 1, 1, dtype=x.dtype, device=x.device) < keep_ratio
        return x.div(keep_ratio) * kept


class Attention(nn.Module):
    """Multi-head attention that stores its [B, H, N, N] weights.

    Args:
        dim: C.
        num_heads: H.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens x [B, N, C] within each sample."""
        B, N, C = x.shape  # noqa: N806
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [B, H, N, D]
        weights = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        weights = weights.softmax(dim=-1)  # [B, H, N, N]
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    """Two linear layers with GELU between.

    Args:
        dim: C.
        hidden: F.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens x [B, N, C]."""
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    """Gated feed-forward layer with gate and value from one linear layer.

    Args:
        dim: C.
        hidden: width of the MLP it stands in for; two thirds of it, in eights, are its own.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        hidden = math.ceil(int(hidden * 2 / 3) / 8) * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens x [B, N, C]."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learnt factor a channel.

    Args:
        dim: C.
        initial: value at the start.
    """

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """Scale x [B, N, C]."""
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        dim: C.
        num_heads: H.
        ffn: feed-forward layer.
        drop_ratio: of both residual branches.
        layer_scale: initial LayerScale.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ffn: Literal["mlp", "swiglu"],
        drop_ratio: float,
        layer_scale: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = (Mlp if ffn == "mlp" else SwiGLU)(dim, 4 * dim)
        self.ls2 = LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens x [B, N, C]."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    """Patches to tokens by a strided convolution.

    Args:
        patch_size: side of a patch in pixels.
        dim: C.
    """

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to [B, C, rows, columns]."""
        return self.proj(x)


class VisionTransformer(nn.Module):
    """Images of one size to normalised tokens.

    Args:
        image_px: side whose patches the stored positions stand for.
        patch_size: side of a patch in pixels.
        dim: C.
        depth: blocks.
        num_heads: H.
        ffn: feed-forward layer.
        drop_ratio: share of samples each branch drops in training.
        layer_scale: initial LayerScale.
    """

    def __init__(
        self,
        *,
        image_px: int,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        ffn: Literal["mlp", "swiglu"],
        drop_ratio: float,
        layer_scale: float,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch_size, dim)
        num_patches = (image_px // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, ffn=ffn, drop_ratio=drop_ratio, layer_scale=layer_scale)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """All tokens of a batch.

        Args:
            x: [B, 3, H, W].
            masks: [B, N] bool, patches the mask token stands in for.
        Returns:
            [B, 1 + N, C] after the final norm, CLS first.
        """
        x = self.patch_embed(x)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)  # [B, N, C]
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x), dim=1)
        x = x + self._positions(grid)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Stored positions, resized where an image has another grid than theirs."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if grid == (side, side):
            return self.pos_embed
        patches = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        factors = [(length + OFFICIAL_OFFSET) / side for length in grid]
        patches = F.interpolate(patches, scale_factor=factors, mode="bicubic")
        return torch.cat((self.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)), dim=1)
