"""KoLeo term: spreads the CLS features of different images over the sphere."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dinov2_fast.ops.koleo import koleo


def koleo_loss(global_cls: Tensor, *, crops: Literal["both", "first"]) -> Tensor:
    """Sum over crops of -mean(log(distance to the nearest other image of the same crop)).

    Args:
        global_cls: [2B, C] student CLS features of the global crops before the head, first crops
            of all images first. Only the images of this process are compared.
        crops: `both` sums two terms (the published training code), `first` has one (the paper).
    Returns:
        An fp32 scalar without its weight; 0 with one image, which has no neighbour.
    Source: Sablayrolles et al. 2019, "Spreading vectors for similarity search"; DINOv2 paper,
        section 4 and appendix B.1.
    """
    first, second = global_cls.chunk(2)  # [B, C] each
    if crops == "first":
        return koleo(first)
    return koleo(first) + koleo(second)
