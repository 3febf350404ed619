"""A linear layer whose products under autocast take the fastest library of this processor."""

from __future__ import annotations

from torch import Tensor, nn

from dinov2_fast.ops._matmul import autocast_linear


class Linear(nn.Linear):
    """`torch.nn.Linear`, with PyTorch's own bfloat16 products only where they are fast."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features], in the type autocast asks for."""
        return autocast_linear(input, self.weight, self.bias)
