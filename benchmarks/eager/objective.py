"""The losses, one full probability tensor a term."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_GLOBAL = 2


class EagerObjective(nn.Module):
    """Image-level and patch-level cross-entropy with softmax centering, and KoLeo.

    Args:
        num_prototypes: K.
        student_temperature: divides the student's scores.
        center_momentum: share of the old centre in the new one.
        koleo_weight: weight of the KoLeo term.
    Source: Zhou et al. 2022, "iBOT"; Sablayrolles et al. 2019 (KoLeo).
    """

    center: Tensor
    patch_center: Tensor

    def __init__(
        self,
        num_prototypes: int,
        *,
        student_temperature: float,
        center_momentum: float,
        koleo_weight: float,
    ) -> None:
        super().__init__()
        self.student_temperature = student_temperature
        self.center_momentum = center_momentum
        self.koleo_weight = koleo_weight
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        self.register_buffer("patch_center", torch.zeros(1, 1, num_prototypes))

    def forward(
        self,
        student_cls: Tensor,
        student_patches: Tensor,
        teacher_cls: Tensor,
        teacher_patches: Tensor,
        masks: Tensor,
        global_features: Tensor,
        *,
        teacher_temperature: float,
    ) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            student_cls: [2B + LB, K] scores of all crops, first crops of all images first.
            student_patches: [2B, N, K] scores of every patch of the global crops.
            teacher_cls: [2B, K].
            teacher_patches: [2B, N, K].
            masks: [2B, N] bool.
            global_features: [2B, C] student CLS features before the head.
            teacher_temperature: divides the teacher's scores.
        Returns:
            `dino`, `ibot`, `koleo` unweighted and `total`.
        """
        num_images = len(teacher_cls) // NUM_GLOBAL
        student_views = (student_cls / self.student_temperature).split(num_images)
        student_patch_views = (student_patches / self.student_temperature).split(num_images)
        targets = F.softmax((teacher_cls - self.center) / teacher_temperature, dim=-1)
        patch_targets = F.softmax(
            (teacher_patches - self.patch_center) / teacher_temperature, dim=-1
        )
        dino, ibot = student_cls.new_zeros(()), student_cls.new_zeros(())
        num_pairs = 0
        for crop, target in enumerate(targets.split(num_images)):
            for view, scores in enumerate(student_views):
                if view == crop:
                    continue
                dino = dino + (-target * F.log_softmax(scores, dim=-1)).sum(dim=-1).mean()
                num_pairs += 1
        for crop, target in enumerate(patch_targets.split(num_images)):
            scores = student_patch_views[crop]
            per_patch = (-target * F.log_softmax(scores, dim=-1)).sum(dim=-1)  # [B, N]
            mask = masks[crop * num_images : (crop + 1) * num_images].float()
            per_image = (per_patch * mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)
            ibot = ibot + per_image.mean() / NUM_GLOBAL
        dino = dino / num_pairs
        koleo = torch.stack([koleo_term(x) for x in global_features.chunk(NUM_GLOBAL)]).sum()
        self._update_centers(teacher_cls, teacher_patches)
        total = dino + ibot + self.koleo_weight * koleo
        return {"dino": dino, "ibot": ibot, "koleo": koleo, "total": total}

    @torch.no_grad()
    def _update_centers(self, teacher_cls: Tensor, teacher_patches: Tensor) -> None:
        momentum = self.center_momentum
        mean, patch_mean = teacher_cls.mean(dim=0), teacher_patches.mean(dim=(0, 1))
        self.center.mul_(momentum).add_(mean * (1 - momentum))
        self.patch_center.mul_(momentum).add_(patch_mean * (1 - momentum))


def koleo_term(features: Tensor) -> Tensor:
    """-mean log distance to the nearest other row of features [B, C]; 0 for one row."""
    if len(features) < 2:
        return features.new_zeros(())
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), dim=-1, eps=1e-8)
        with torch.no_grad():
            similarity = x @ x.T
            nearest = similarity.fill_diagonal_(-1).argmax(dim=1)
        return -(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).log().mean()
