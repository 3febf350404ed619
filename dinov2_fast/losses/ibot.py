"""Patch-level loss: student scores at masked patches against the teacher's at the same patches."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast.losses.targets import SoftTargets
from dinov2_fast.ops.cross_entropy import cross_entropy
from dinov2_fast.ops.cross_entropy_prototypes import prototype_cross_entropy


def ibot_loss(
    student_logits: Tensor,
    targets: SoftTargets,
    mask_weights: Tensor,
    *,
    num_crops: int,
    student_temperature: float,
) -> Tensor:
    """Weighted cross-entropy summed over masked patches, divided by the number of crops.

    Every crop counts in the divisor, masked or not: with half of the crops masked this is half of
    the mean over masked crops. The published models were trained so.

    Args:
        student_logits: [M, K] student scores at the masked patches, padding removed; M may be 0.
        targets: the teacher's for the same M patches.
        mask_weights: [M] 1 / number of masked patches in the patch's crop.
        num_crops: 2B, global crops of the batch.
        student_temperature: divides the student's scores.
    Returns:
        An fp32 scalar.
    Raises:
        ValueError: the numbers of rows differ.
    Source: Zhou et al. 2022, "iBOT: Image BERT pre-training with online tokenizer"; DINOv2
        training code (the divisor).
    """
    num_masked = student_logits.shape[0]
    _check_rows(num_masked, targets, mask_weights)
    per_patch = cross_entropy(
        student_logits,
        targets.logits,
        targets.log_u,
        targets.log_v,
        teacher_rows=torch.arange(num_masked, device=student_logits.device),
        student_temperature=student_temperature,
        teacher_temperature=targets.temperature,
    )  # [M]
    return (per_patch * mask_weights).sum() / num_crops


def ibot_prototype_loss(
    features: Tensor,
    weight: Tensor,
    targets: SoftTargets,
    mask_weights: Tensor,
    *,
    num_crops: int,
    student_temperature: float,
) -> Tensor:
    """`ibot_loss` of the scores `features @ weight.T`, which are never stored whole.

    Args:
        features: [M, Cb] student vectors at the masked patches, padding removed; M may be 0.
        weight: [K, Cb] prototypes.
        targets: the teacher's for the same M patches.
        mask_weights: [M] 1 / number of masked patches in the patch's crop.
        num_crops: 2B, global crops of the batch.
        student_temperature: divides the student's scores.
    Returns:
        An fp32 scalar.
    Raises:
        ValueError: the numbers of rows differ.
    """
    num_masked = features.shape[0]
    _check_rows(num_masked, targets, mask_weights)
    total, _ = prototype_cross_entropy(
        features,
        weight,
        targets.logits,
        targets.log_u,
        targets.log_v,
        teacher_rows=torch.arange(num_masked, device=features.device).unsqueeze(1),
        row_weights=mask_weights / num_crops,
        student_temperature=student_temperature,
        teacher_temperature=targets.temperature,
    )
    return total


def _check_rows(num_masked: int, targets: SoftTargets, mask_weights: Tensor) -> None:
    """Refuse other numbers of targets or weights than of student rows."""
    if targets.logits.shape[0] != num_masked or mask_weights.shape != (num_masked,):
        raise ValueError(
            f"ibot: expected {num_masked} target rows and weights, as many as student rows, "
            f"got {targets.logits.shape[0]} and {tuple(mask_weights.shape)}"
        )
