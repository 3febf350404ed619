"""What a training step receives: crops, masks and where they came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unreadable:
    """An image that was drawn and could not be used."""

    index: int
    """Index in the source."""
    name: str
    """Where it lies; may hold any character."""
    offset: int | None
    """Byte offset inside a tar file."""
    reason: str
    """Why it could not be read or decoded."""


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step. Crops are crop-major: all first crops, then all second ones."""

    global_crops: Tensor
    """fp32 [2B, 3, H, W], normalised."""
    local_crops: Tensor
    """fp32 [LB, 3, h, w], normalised."""
    masks: Tensor
    """bool [2B, N], true where a patch of a global crop is masked."""
    mask_indices: Tensor
    """int64 [M_pad], flat positions of masked patches in [2B * N]; 0 beyond `num_masked`."""
    mask_weights: Tensor
    """fp32 [M_pad], 1 / (masked patches of the crop); 0 beyond `num_masked`."""
    sample_indices: Tensor
    """int64 [B], the images used, substitutes included."""
    num_masked: int
    """M, masked patches; the only size here that differs between steps."""
    step: int
    """Optimizer steps taken before this batch."""
    unreadable: tuple[Unreadable, ...] = ()
    """Images that were drawn for this batch and replaced."""

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """The batch with its tensors on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch with its tensors in page-locked memory, from which copies can overlap work."""
        return self._map(lambda tensor: tensor.pin_memory())

    def share_memory(self) -> Batch:
        """The batch with its tensors in memory that other processes can take over.

        Raises:
            RuntimeError: the system has no such memory left.
        """
        return self._map(lambda tensor: tensor.share_memory_())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed = {
            name: function(value) for name, value in fields.items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **changed)


def index_masks(masks: Tensor, *, upper_bound: int) -> tuple[Tensor, Tensor, int]:
    """Masks as the positions and weights that the iBOT loss reads, padded to a constant length.

    Args:
        masks: bool [2B, N].
        upper_bound: M_pad, at least the number of true entries.

    Returns:
        Flat positions int64 [M_pad] in rising order, weights fp32 [M_pad] that sum to 1 over every
        masked crop, and the number M of entries that are not padding.

    Raises:
        ValueError: more masked patches than `upper_bound`.
    """
    positions = masks.flatten().nonzero().flatten()  # [M]
    num_masked = positions.numel()
    if num_masked > upper_bound:
        raise ValueError(
            f"index_masks: expected at most {upper_bound} masked patches, got {num_masked}"
        )
    weights = (1.0 / masks.sum(1).clamp(min=1).float())[positions // masks.shape[1]]
    padded_positions = torch.zeros(upper_bound, dtype=torch.int64)
    padded_weights = torch.zeros(upper_bound)
    padded_positions[:num_masked] = positions
    padded_weights[:num_masked] = weights
    return padded_positions, padded_weights, num_masked
