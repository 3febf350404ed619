"""KoLeo: spread the images of a batch by pushing each one away from its nearest neighbour."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.backends import choose_backend
from dinov2_fast.ops._checks import accumulation_dtype, check_positive, check_tensor


def koleo_reference(x: Tensor, *, eps: float) -> Tensor:
    """-mean_i log(|x_i - x_n(i)| + eps) over normalised rows, n(i) the nearest other row.

    Args:
        x: [B, C], at least two rows.
        eps: guards norms, distances and the logarithm.
    Returns:
        A scalar in the dtype of x.
    """
    x = F.normalize(x, dim=1, eps=eps)
    with torch.no_grad():
        similarity = x @ x.T  # [B, B]
        nearest = similarity.fill_diagonal_(-torch.inf).argmax(dim=1)  # the lowest index wins a tie
    neighbour = x[nearest]  # [B, C]
    distance = F.pairwise_distance(x, neighbour, eps=eps)  # [B]
    # Between equal rows the direction is that of eps, rounding alone, times 1 / eps: no gradient.
    duplicate = (x == neighbour).all(dim=1)
    distance = torch.where(duplicate, distance.detach(), distance)
    return -(distance + eps).log().mean()


def koleo(x: Tensor, *, eps: float = 1e-8, backend: str | None = None) -> Tensor:
    """Kozachenko-Leonenko estimate of the batch's differential entropy, negated.

    Computed in float32 whatever the type of x and of autocast: in float16 the default eps is 0 and
    two equal rows make the loss infinite.

    Args:
        x: [B, C] features, not normalised.
        eps: guards norms, distances and the logarithm.
        backend: see `backends.choose_backend`.
    Returns:
        A float32 scalar (float64 for float64 x), finite for finite x; the gradient flows through
        both rows of a pair, and is zero for a pair of equal rows. 0 if B < 2.
    Raises:
        TypeError: x not floating-point.
        ValueError: wrong shape, or eps <= 0.
        BackendUnavailable: the explicit backend cannot compute this call.
    Source: Sablayrolles et al., "Spreading vectors for similarity search", 2019; DINOv2's code.
    """
    check_tensor("koleo", "x", x, "B", "C")
    check_positive("koleo", eps=eps)
    choose_backend("koleo", x, backend)  # raises for what has no kernel
    x = x.to(accumulation_dtype(x))
    if x.shape[0] < 2:
        return x[:0].sum()  # keeps the graph, and ignores what the only row holds
    with torch.autocast(x.device.type, enabled=False):
        return koleo_reference(x, eps=eps)
