"""The projection head of DINO and iBOT: an MLP, a normalised bottleneck, prototypes."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2_fast.nn.linear import Linear
from dinov2_fast.ops._matmul import autocast_linear


class Prototypes(nn.Module):
    """A bias-free linear layer whose rows have a learnt length each.

    Official DINOv2 writes this with the old weight-norm hook; the keys are the same.

    Args:
        in_features: channels of the bottleneck.
        num_prototypes: K.
    """

    def __init__(self, in_features: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(num_prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Directions as torch initialises a Linear, every length 1 and trainable."""
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))
        nn.init.ones_(self.weight_g)

    @property
    def weight(self) -> Tensor:
        """[K, in_features] rows of length `weight_g`."""
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """Scores [R, K] of x [R, in_features]."""
        return autocast_linear(x, self.weight, None)

    def extra_repr(self) -> str:
        """What `print(head)` shows."""
        return f"{self.weight_v.shape[1]} -> {self.weight_v.shape[0]}"


class DINOHead(nn.Module):
    """Scores of tokens against K prototypes.

    Args:
        in_dim: C, channels of the backbone.
        num_prototypes: K.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width of the normalised vector that meets the prototypes.
        num_layers: linear layers before the prototypes.
    Raises:
        ValueError: less than one layer.
    Source: "Emerging Properties in Self-Supervised Vision Transformers" (DINO), arXiv 2104.14294.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"head: expected num_layers of at least 1, got {num_layers}")
        self.mlp = _projection(in_dim, hidden_dim, bottleneck_dim, num_layers)
        self.last_layer = Prototypes(bottleneck_dim, num_prototypes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's global generator."""
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer.reset_parameters()

    def forward(self, x: Tensor, *, scored: bool = True) -> Tensor | tuple[Tensor, Tensor]:
        """Score tokens, or give what makes their scores.

        Args:
            x: [R, C] normalised backbone outputs, CLS or patches.
            scored: False leaves the product of the two to a loss that never stores it whole.
        Returns:
            [R, K] logits before any temperature; not scored, the unit vectors
            [R, bottleneck_dim] and the prototypes [K, bottleneck_dim] whose products they are.
        """
        x = self.bottleneck(x)
        return self.last_layer(x) if scored else (x, self.last_layer.weight)

    def bottleneck(self, x: Tensor) -> Tensor:
        """Unit vectors [R, bottleneck_dim] of tokens x [R, C]: what meets the prototypes."""
        x = self.mlp(x)
        # 1e-12 is zero in float16, and a zero row would divide by it.
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12
        return F.normalize(x, dim=-1, eps=eps)


def _projection(in_dim: int, hidden_dim: int, bottleneck_dim: int, num_layers: int) -> nn.Module:
    """Linear layers with GELU between; a bare Linear where one is all, as in official keys."""
    widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [Linear(fan_in, fan_out), nn.GELU()]
    return layers[0] if num_layers == 1 else nn.Sequential(*layers[:-1])
