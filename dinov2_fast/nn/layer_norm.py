"""Layer normalisation over channels, optionally of chosen rows only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_fast.nn.input_forms import run_token_by_token
from dinov2_fast.ops.layer_norm import layer_norm
from dinov2_fast.packing import Pack


class LayerNorm(nn.Module):
    """`torch.nn.LayerNorm` over the last dimension that can read a subset of rows.

    Args:
        normalized_shape: C, channels; or a list or tuple of it alone.
        eps: added to the variance; DINOv2's, while that of `torch.nn.LayerNorm` is 1e-5.
        elementwise_affine: weight and bias, True.
    Raises:
        ValueError: several dimensions, or no weight and bias.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-6,
        elementwise_affine: bool = True,
    ) -> None:
        super().__init__()
        shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
        if len(shape) != 1 or not elementwise_affine:
            raise ValueError(
                "layer_norm: expected normalized_shape of one dimension and elementwise_affine "
                f"True, got {normalized_shape} and {elementwise_affine}; use torch.nn.LayerNorm"
            )
        (dim,) = shape
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as a plain normalisation: weight 1, bias 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        pack: Pack | None = None,
        *,
        rows: Tensor | None = None,
    ) -> Any:
        """Normalise tokens one by one, all of them or only `rows` of [T, C].

        Args:
            x: [..., C], [T, C] with a pack, or a list of [..., C].
            pack: layout of [T, C], which makes no difference.
            rows: [R] int64, rows of [T, C] to take; None takes all.
        Returns:
            The shape of x, a list for a list; or [R, C].
        """
        if pack is not None or not isinstance(x, Tensor):
            if rows is not None and not isinstance(x, Tensor):
                raise ValueError(
                    "layer_norm: expected no rows beside a list of tensors, got "
                    f"{tuple(rows.shape)}; pack the list, or pick rows of the outputs"
                )
            forward = partial(self.forward, rows=rows)
            return run_token_by_token(forward, x, pack, name="layer_norm")
        return layer_norm(x, self.weight, self.bias, eps=self.eps, rows=rows)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
