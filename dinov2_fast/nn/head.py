"""The projection head of DINO and iBOT: an MLP, a normalised bottleneck, prototypes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov2_fast.nn.input_forms import run_token_by_token
from dinov2_fast.nn.linear import Linear
from dinov2_fast.ops._matmul import autocast_linear
from dinov2_fast.packing import Pack


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
        out_dim: K, prototypes.
        use_bn: batch normalisation between the layers, False.
        nlayers: linear layers before the prototypes.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width of the normalised vector that meets the prototypes.
        mlp_bias: whether the linear layers have a bias.
    Raises:
        ValueError: less than one layer, or batch normalisation.
    Source: "Emerging Properties in Self-Supervised Vision Transformers" (DINO), arXiv 2104.14294.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        if nlayers < 1:
            raise ValueError(f"head: expected nlayers of at least 1, got {nlayers}")
        if use_bn:
            raise ValueError(
                "head: expected use_bn False, got True; DINOv2 trains without, and statistics of a "
                "list of batches would mix them"
            )
        widths = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        self.mlp = _projection(widths, bias=mlp_bias)
        self.last_layer = Prototypes(bottleneck_dim, out_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's global generator."""
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.last_layer.reset_parameters()

    def forward(
        self, x: Tensor | Sequence[Tensor], pack: Pack | None = None, *, scored: bool = True
    ) -> Any:
        """Score tokens, or give what makes their scores.

        Args:
            x: [..., C] normalised backbone outputs, CLS or patches; [T, C] with a pack, or a list
                of [..., C].
            pack: layout of [T, C], which makes no difference.
            scored: False leaves the product of the two to a loss that never stores it whole.
        Returns:
            [..., K] logits before any temperature, a list for a list; not scored, the unit vectors
            [..., bottleneck_dim], a list for a list, and the prototypes [K, bottleneck_dim] whose
            products they are.
        """
        if pack is not None or not isinstance(x, Tensor):
            run = partial(run_token_by_token, x=x, pack=pack, name="head")
            return run(self.forward) if scored else (run(self.bottleneck), self.last_layer.weight)
        x = self.bottleneck(x)
        return self.last_layer(x) if scored else (x, self.last_layer.weight)

    def bottleneck(self, x: Tensor) -> Tensor:
        """Unit vectors [..., bottleneck_dim] of tokens x [..., C]: what meets the prototypes."""
        x = self.mlp(x)
        # 1e-12 is zero in float16, and a zero row would divide by it.
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12
        return F.normalize(x, dim=-1, eps=eps)


def _projection(widths: list[int], *, bias: bool) -> nn.Module:
    """Linear layers with GELU between; a bare Linear where one is all, as in official keys."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [Linear(fan_in, fan_out, bias=bias), nn.GELU()]
    return nn.Sequential(*layers[:-1]) if len(widths) > 2 else layers[0]
