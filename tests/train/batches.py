"""Small synthetic batches with everything a step needs, as pure functions of a seed."""

from __future__ import annotations

import torch

from dinov2_fast.config import CropConfig, HeadConfig, LossConfig, ModelConfig
from dinov2_fast.data.collate import Batch, index_masks
from dinov2_fast.train.student_teacher import (
    StudentTeacher,
    Targets,
    build_student_teacher,
    student_losses,
    teacher_targets,
)

MODEL = ModelConfig(arch="debug", drop_ratio=0.0)
# 42 / 14 = 3 x 3 patches, 28 / 14 = 2 x 2: local crops go through the resize of positions.
CROPS = CropConfig(global_px=42, local_px=28, num_local=3)
HEAD = HeadConfig(num_prototypes=24, hidden_dim=16, bottleneck_dim=8)
SHARED = LossConfig(dino_head=HEAD)
# Different sizes, so that swapped heads cannot go unnoticed.
SEPARATE = LossConfig(
    separate_ibot_head=True,
    dino_head=HEAD,
    ibot_head=HeadConfig(num_prototypes=15, hidden_dim=12, bottleneck_dim=6),
)


def build_pair(
    loss: LossConfig = SHARED, *, model: ModelConfig = MODEL, seed: int = 0, **options
) -> StudentTeacher:
    """A tiny pair; its teacher is moved away from the student, lest the two be confused."""
    pair = build_student_teacher(
        model,
        loss,
        CROPS,
        **{"recipe": "official", "seed": seed, "device": "cpu", **options},
    )
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for network in (pair.student, pair.teacher):
            for parameter in network.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * 0.1)
    return pair


def synthetic_batch(
    seed: int = 0,
    *,
    batch_size: int = 3,
    num_local: int = 3,
    masked_counts: tuple[int, ...] = (2, 0, 4, 1, 0, 0),
    num_padding: int = 2,
) -> Batch:
    """Noise crops with the given numbers of masked patches in the 2B global crops.

    Args:
        seed: of pixels and mask positions.
        batch_size: B.
        num_local: L.
        masked_counts: one number for each of the 2B global crops of 9 patches.
        num_padding: unused entries at the end of the masked-patch buffers.
    """
    assert len(masked_counts) == 2 * batch_size
    generator = torch.Generator().manual_seed(seed)
    num_patches = (CROPS.global_px // 14) ** 2
    masks = torch.zeros(2 * batch_size, num_patches, dtype=torch.bool)
    for crop, count in enumerate(masked_counts):
        masks[crop, torch.randperm(num_patches, generator=generator)[:count]] = True
    upper_bound = sum(masked_counts) + num_padding
    indices, weights, num_masked = index_masks(masks, upper_bound=upper_bound)
    side, local_side = CROPS.global_px, CROPS.local_px
    return Batch(
        global_crops=torch.randn(2 * batch_size, 3, side, side, generator=generator),
        local_crops=torch.randn(
            num_local * batch_size, 3, local_side, local_side, generator=generator
        ),
        masks=masks,
        mask_indices=indices,
        mask_weights=weights,
        num_masked=num_masked,
        step=seed,
        sample_indices=torch.arange(batch_size),
    )


def targets_and_losses(
    pair: StudentTeacher, batch: Batch
) -> tuple[Targets, dict[str, torch.Tensor]]:
    """The forward half of a step."""
    targets = teacher_targets(pair, batch, temperature=0.05)
    return targets, student_losses(pair, batch, targets)
