"""A ViT under the class and attribute names of DINOv2's published layers, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DropPath(nn.Module):
    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = torch.rand(len(x), *[1] * (x.ndim - 1)) >= self.drop_prob
        return x * keep.to(x.dtype) / (1 - self.drop_prob)


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class MemEffAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv, attn_mask=attn_bias)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class CausalAttention(MemEffAttention):
    """Carries another type's name below: what a changed copy of the layers looks like."""

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        return super().forward(x, torch.full((x.shape[1],) * 2, -torch.inf).triu(1).to(x.dtype))


CausalAttention.__name__ = "MemEffAttention"


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class SwiGLUFFNFused(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class NestedTensorBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, ffn: type[nn.Module], drop_ratio: float) -> None:
        super().__init__()
        self.sample_drop_ratio = drop_ratio
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = MemEffAttention(dim, num_heads), ffn(dim)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)
        self.drop_path1, self.drop_path2 = DropPath(drop_ratio), DropPath(drop_ratio)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise AssertionError("lists need xFormers")
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class DinoVisionTransformer(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, depth: int, ffn: type[nn.Module], drop_ratio: float
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 14, 14)
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, dim))  # of images of 28 px
        self.blocks = nn.ModuleList(
            NestedTensorBlock(dim, num_heads, ffn, drop_ratio) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
