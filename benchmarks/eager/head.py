"""The projection head, on every token it is given."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Prototypes(nn.Module):
    """A linear layer with weight normalisation.

    Args:
        in_features: channels of the bottleneck.
        num_prototypes: K.
    """

    def __init__(self, in_features: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, in_features))
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [..., K] of x [..., in_features]."""
        weight = torch.ops.aten._weight_norm(self.weight_v, self.weight_g, 0)
        return F.linear(x, weight)


class Head(nn.Module):
    """MLP, L2 normalisation, prototypes.

    Args:
        dim: C.
        num_prototypes: K.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width of the vector that meets the prototypes.
    """

    def __init__(
        self, dim: int, num_prototypes: int, *, hidden_dim: int, bottleneck_dim: int
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.last_layer = Prototypes(bottleneck_dim, num_prototypes)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the CLS [B, K] and of all patches [B, N, K] of tokens [B, 1 + N, C]."""
        x = F.normalize(self.mlp(tokens), dim=-1)
        return self.last_layer(x[:, 0]), self.last_layer(x[:, 1:])
