"""Image-level loss: the student's CLS scores of a crop against the teacher's of another crop."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast.losses.targets import SoftTargets
from dinov2_fast.ops.cross_entropy import cross_entropy
from dinov2_fast.ops.cross_entropy_prototypes import prototype_cross_entropy

NUM_GLOBAL = 2  # global crops per image; the swap below pairs exactly two


def dino_loss(
    global_logits: Tensor,
    local_logits: Tensor,
    targets: SoftTargets,
    *,
    student_temperature: float,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over all pairs of a student crop and another, global, teacher crop.

    With L local crops an image has 2 + 2L pairs (18 for L = 8), all of the same weight; a crop is
    never paired with itself.

    Args:
        global_logits: [2B, K] student scores of the global crops, first crops of all images first.
        local_logits: [LB, K] student scores of the local crops in the same order; L may be 0.
        targets: the teacher's for the 2B global crops in the same order.
        student_temperature: divides the student's scores.
    Returns:
        The part of the pairs with a global and with a local student crop, two fp32 scalars; the
        loss is their sum.
    Raises:
        ValueError: the numbers of rows do not fit together.
    Source: Caron et al. 2021, section 3.1; DINOv2 training code (weights of the terms).
    """
    batch_size, num_local = _sizes(global_logits.shape[0], local_logits.shape[0], targets)
    pair_weight = _pair_weight(batch_size, num_local)

    def summed(student_logits: Tensor, teacher_rows: Tensor) -> Tensor:
        per_row = cross_entropy(
            student_logits,
            targets.logits,
            targets.log_u,
            targets.log_v,
            teacher_rows=teacher_rows,
            student_temperature=student_temperature,
            teacher_temperature=targets.temperature,
        )
        return per_row.sum() * pair_weight

    images = torch.arange(batch_size, device=targets.logits.device)
    first, second = images, images + batch_size
    global_loss = summed(global_logits, torch.cat((second, first)))  # halves swapped
    local_loss = torch.zeros_like(global_loss)
    if num_local > 0:
        local_loss = summed(local_logits, first.repeat(num_local))
        local_loss = local_loss + summed(local_logits, second.repeat(num_local))
    return global_loss, local_loss


def dino_prototype_loss(
    features: Tensor,
    weight: Tensor,
    targets: SoftTargets,
    *,
    num_global: int,
    student_temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dino_loss` of the scores `features @ weight.T`, which are never stored whole.

    Args:
        features: [2B + LB, Cb] student vectors of the global, then the local crops, each in the
            order that `dino_loss` asks for.
        weight: [K, Cb] prototypes.
        targets: the teacher's for the 2B global crops in the same order.
        num_global: 2B.
        student_temperature: divides the student's scores.
    Returns:
        The loss, with a graph, and its two parts as `dino_loss` gives them, without; fp32 scalars.
    Raises:
        ValueError: the numbers of rows do not fit together.
    """
    batch_size, num_local = _sizes(num_global, features.shape[0] - num_global, targets)
    pair_weight = _pair_weight(batch_size, num_local)
    images = torch.arange(batch_size, device=features.device)
    first, second = images, images + batch_size
    none = torch.full_like(images, -1)
    both = (first.repeat(num_local), second.repeat(num_local))
    teacher_rows = torch.stack(
        (torch.cat((second, first, both[0])), torch.cat((none, none, both[1]))), dim=1
    )  # [2B + LB, 2]
    total, losses = prototype_cross_entropy(
        features,
        weight,
        targets.logits,
        targets.log_u,
        targets.log_v,
        teacher_rows=teacher_rows,
        row_weights=targets.log_u.new_full((features.shape[0],), pair_weight),
        student_temperature=student_temperature,
        teacher_temperature=targets.temperature,
    )
    global_loss = losses[:num_global].sum() * pair_weight
    local_loss = losses[num_global:].sum() * pair_weight
    # The sum of the parts to the bit, with the graph of the total.
    return (global_loss + local_loss) + (total - total.detach()), global_loss, local_loss


def _sizes(num_global: int, num_local: int, targets: SoftTargets) -> tuple[int, int]:
    """Images B and local crops L of each, from the numbers of student rows."""
    num_teacher = targets.logits.shape[0]  # 2B
    batch_size = num_teacher // NUM_GLOBAL
    if num_teacher != NUM_GLOBAL * batch_size or num_global != num_teacher:
        raise ValueError(
            f"dino: expected {NUM_GLOBAL} teacher rows per image and as many global student rows, "
            f"got {num_teacher} and {num_global}"
        )
    if batch_size == 0 or num_local % batch_size:
        raise ValueError(
            f"dino: expected a multiple of the {batch_size} images as local student rows, "
            f"got {num_local}"
        )
    return batch_size, num_local // batch_size


def _pair_weight(batch_size: int, num_local: int) -> float:
    """One over the number of pairs of all images."""
    return 1 / (batch_size * (NUM_GLOBAL + NUM_GLOBAL * num_local))
