from __future__ import annotations

import dataclasses

import pytest
import torch

from dinov2_fast.data.collate import Batch, Unreadable, index_masks


def batch() -> Batch:
    masks = torch.tensor([[True, False, True], [False, False, False]])
    indices, weights, num_masked = index_masks(masks, upper_bound=4)
    return Batch(
        global_crops=torch.randn(2, 3, 4, 4),
        local_crops=torch.randn(3, 3, 2, 2),
        masks=masks,
        mask_indices=indices,
        mask_weights=weights,
        sample_indices=torch.tensor([7]),
        num_masked=num_masked,
        step=5,
        unreadable=(Unreadable(1, "a.png", None, "broken"),),
    )


def test_known_masks_give_known_indices_and_weights():
    masks = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    indices, weights, num_masked = index_masks(masks, upper_bound=5)
    assert indices.tolist() == [0, 2, 7, 0, 0]
    assert weights.tolist() == [0.5, 0.5, 1.0, 0.0, 0.0]
    assert num_masked == 3


def test_no_mask_and_no_room_are_fine():
    indices, weights, num_masked = index_masks(torch.zeros(2, 4, dtype=torch.bool), upper_bound=0)
    assert (indices.shape, weights.shape, num_masked) == ((0,), (0,), 0)


@pytest.mark.parametrize("target", ["cpu", "meta"])
def test_moving_a_batch_moves_every_tensor_and_keeps_the_rest(target):
    moved = batch().to(target)
    for field in dataclasses.fields(Batch):
        value = getattr(moved, field.name)
        if isinstance(value, torch.Tensor):
            assert value.device.type == target
    assert (moved.num_masked, moved.step, moved.unreadable) == (2, 5, batch().unreadable)
    assert moved.masks.dtype == torch.bool


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a CUDA device")
def test_pinning_pins_every_tensor():
    pinned = batch().pin_memory()
    assert pinned.global_crops.is_pinned()
    assert pinned.mask_indices.is_pinned()


def test_a_batch_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch().step = 1
