"""The teacher's scores as targets: Sinkhorn-Knopp or softmax with a moving centre.

Both are kept as the scores themselves plus one vector per axis, so [R, K] probabilities are never
stored: target = exp(logits / temperature + log_u + log_v[:, None]).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinov2_fast.config import LossConfig
from dinov2_fast.distributed import all_reduce_sum
from dinov2_fast.ops.sinkhorn import row_logsumexp, sinkhorn


@dataclass(frozen=True)
class SoftTargets:
    """Targets of R teacher rows; every row of probabilities sums to 1."""

    logits: Tensor
    """[R, K] prototype scores of the teacher."""
    log_u: Tensor
    """[K] fp32, one term per prototype."""
    log_v: Tensor
    """[R] fp32, one term per row."""
    temperature: float
    """The teacher's temperature."""

    def probabilities(self) -> Tensor:
        """The [R, K] probabilities, for a meter or a test; no loss needs them."""
        scores = self.logits.to(self.log_u.dtype) / self.temperature
        return (scores + self.log_u + self.log_v[:, None]).exp()


class SinkhornCentering(nn.Module):
    """Targets by Sinkhorn-Knopp: prototypes are used equally over the rows of all processes.

    Args:
        num_iterations: rounds; the last one normalises rows, so each sums to 1.
    Source: Caron et al. 2020, "Unsupervised learning of visual features by contrasting cluster
        assignments"; DINOv2 paper, section 4.
    """

    def __init__(self, *, num_iterations: int) -> None:
        super().__init__()
        self.num_iterations = num_iterations

    @torch.no_grad()
    def forward(self, logits: Tensor, *, temperature: float) -> SoftTargets:
        """Targets of teacher scores [R, K]; R may be 0 on some process, padding is not allowed."""
        log_u, log_v = sinkhorn(logits, temperature=temperature, num_iterations=self.num_iterations)
        return SoftTargets(logits, log_u, log_v, temperature)


class SoftmaxCentering(nn.Module):
    """Targets by a softmax of scores minus their moving average over the steps before this one.

    The average of a step is taken over its rows on each process, then over the processes, whatever
    number of rows each has. It enters the centre after this step's targets are made; a process
    without rows has no say, and an average that is not finite (a broken batch) is left out.

    Args:
        num_prototypes: K.
        momentum: share of the old centre in the new one.
    Source: Caron et al. 2021, "Emerging properties in self-supervised vision transformers";
        DINOv2 training code (the centre is applied one call late).
    """

    center: Tensor

    def __init__(self, num_prototypes: int, *, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))

    @torch.no_grad()
    def forward(self, logits: Tensor, *, temperature: float) -> SoftTargets:
        """Targets of teacher scores [R, K] with the centre of the earlier calls."""
        log_u = -self.center / temperature
        log_v = -row_logsumexp(logits, log_u, temperature=temperature)  # [R]
        self._update(logits)
        return SoftTargets(logits, log_u, log_v, temperature)

    def _update(self, logits: Tensor) -> None:
        num_rows, num_prototypes = logits.shape
        # One collective for both: the sum of the means and the number of processes with rows.
        message = self.center.new_zeros(num_prototypes + 1)
        if num_rows > 0:
            message[:-1] = logits.to(message.dtype).mean(dim=0)
            message[-1] = 1
        all_reduce_sum(message)
        mean = message[:-1] / message[-1]
        moved = self.center * self.momentum + mean * (1 - self.momentum)
        # 0 / 0 without any row and NaN from a broken batch alike keep the old centre.
        self.center.copy_(torch.where(mean.isfinite().all(), moved, self.center))


def build_centering(loss: LossConfig, *, num_prototypes: int) -> nn.Module:
    """The module that turns teacher scores [R, K] into `SoftTargets`, as the configuration says.

    Args:
        loss: which of the two, and its settings.
        num_prototypes: K.
    Returns:
        A module called with (logits, temperature=...); its state is part of a checkpoint.
    """
    if loss.centering == "sinkhorn_knopp":
        return SinkhornCentering(num_iterations=loss.sinkhorn_iterations)
    return SoftmaxCentering(num_prototypes, momentum=loss.center_momentum)
