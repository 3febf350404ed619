"""KoLeo: spread the images of a batch by pushing each one away from its nearest neighbour."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_fast.backends import choose_backend
from dinov2_fast.ops._checks import accumulation_dtype, check_positive, check_tensor
from dinov2_fast.ops._declare import declare
from dinov2_fast.ops._native import run_native
from dinov2_fast.ops._native_cpu import NATIVE_DEVICES, Argument, on_cuda, refusals
from dinov2_fast.ops._triton import TRITON_DEVICES, device_of, for_triton

# Parts of the keys that multiprocessors search side by side, and keys of a part at least. Both
# depend on the batch alone; no result depends on either.
_MAX_SPLITS, _SPLIT_KEYS = 16, 16
_PANEL_ROWS = 64  # most rows that lie side by side in the scratch of csrc/cpu/koleo.cpp
_MAX_TRITON_CHANNELS = 8192  # of kernels/koleo.py, whose backward holds a row whole


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
    x = x.to(accumulation_dtype(x))
    chosen = choose_backend("koleo", x, backend, refusals=_refusals(x))
    if x.shape[0] < 2:
        return x[:0].sum()  # keeps the graph, and ignores what the only row holds
    if chosen != "reference":
        return _forward(x, eps, chosen)[0]
    with torch.autocast(x.device.type, enabled=False):
        return koleo_reference(x, eps=eps)


def _refusals(x: Tensor) -> dict[str, str]:
    """Why kernels cannot take these rows, as `choose_backend` wants it."""
    refused = refusals({"x": x}, {})
    refused |= for_triton(refused)
    if x.shape[1] > _MAX_TRITON_CHANNELS:
        why = f"x must have at most {_MAX_TRITON_CHANNELS} channels, got {x.shape[1]}"
        refused.setdefault("triton", why)
    return refused


def _forward_native(x: Tensor, eps: float) -> tuple[Tensor, ...]:
    """The loss, and what the backward needs of the rows; native."""
    outputs = _forward_fake(x, eps)
    loss, normalised, norms, nearest, pulls = outputs
    rows, channels = x.shape
    losses = x.new_empty(rows)
    own: dict[str, Argument] = {}
    if on_cuda(x):
        num_splits = min(-(-rows // _SPLIT_KEYS), _MAX_SPLITS)
        bests = x.new_empty((rows, num_splits), dtype=torch.int64)
        own = {"bests": bests, "num_splits": num_splits}
    else:
        panels = x.new_empty(-(-rows // _PANEL_ROWS) * _PANEL_ROWS * channels)
        own = {"panels": panels, "loss": loss}
    run_native(
        "koleo_forward",
        x=x,
        losses=losses,
        normalised=normalised,
        norms=norms,
        nearest=nearest,
        pulls=pulls,
        rows=rows,
        channels=channels,
        x_row_stride=x.stride(0),
        eps=eps,
        **own,
    )
    if on_cuda(x):
        _mean_into(loss, losses)
    return outputs


def _backward_native(
    gradient: Tensor,
    normalised: Tensor,
    norms: Tensor,
    nearest: Tensor,
    pulls: Tensor,
    eps: float,
) -> Tensor:
    """Gradient of x; native."""
    dx = torch.empty_like(normalised)
    own: dict[str, Argument] = (
        {"gradients": _of_losses(gradient, norms)} if on_cuda(dx) else {"gradient": gradient}
    )
    run_native(
        "koleo_backward",
        normalised=normalised,
        norms=norms,
        nearest=nearest,
        pulls=pulls,
        dx=dx,
        rows=dx.shape[0],
        channels=dx.shape[1],
        eps=eps,
        **own,
    )
    return dx


def _forward_triton(x: Tensor, eps: float) -> tuple[Tensor, ...]:
    """The loss, and what the backward needs of the rows; by Triton."""
    from dinov2_fast.kernels import koleo as kernels

    loss, normalised, norms, nearest, pulls = outputs = _forward_fake(x, eps)
    losses = x.new_empty(x.shape[0])
    with device_of(x):
        kernels.forward(x, losses, normalised, norms, nearest, pulls, eps)
    _mean_into(loss, losses)
    return outputs


def _backward_triton(
    gradient: Tensor,
    normalised: Tensor,
    norms: Tensor,
    nearest: Tensor,
    pulls: Tensor,
    eps: float,
) -> Tensor:
    """Gradient of x; by Triton."""
    from dinov2_fast.kernels import koleo as kernels

    dx = torch.empty_like(normalised)
    with device_of(dx):
        kernels.backward(_of_losses(gradient, norms), normalised, norms, nearest, pulls, dx, eps)
    return dx


def _mean_into(loss: Tensor, losses: Tensor) -> None:
    """Write the mean of the losses [B], summed in float64."""
    loss.copy_(losses.mean(dtype=torch.float64))


def _of_losses(gradient: Tensor, norms: Tensor) -> Tensor:
    """Gradients [B] of the losses, of whose mean one is given; norms are [B]."""
    return (gradient.double() / norms.shape[0]).float().expand_as(norms).contiguous()


def _forward_fake(x: Tensor, eps: float) -> tuple[Tensor, ...]:
    """The loss, unit rows [B, C], lengths [B], nearest rows [B], pulls [B]."""
    rows, channels = x.shape
    norms, pulls = x.new_empty(rows), x.new_empty(rows)
    nearest = x.new_empty(rows, dtype=torch.int64)
    return x.new_empty(()), x.new_empty(rows, channels), norms, nearest, pulls


def _backward_fake(
    gradient: Tensor,
    normalised: Tensor,
    norms: Tensor,
    nearest: Tensor,
    pulls: Tensor,
    eps: float,
) -> Tensor:
    return torch.empty_like(normalised)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float, str], output: tuple[Tensor, ...]) -> None:
    """Keep all but the loss."""
    _, ctx.eps, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _gradient(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
    """Gradients of (x, eps, backend)."""
    return _backward(gradient, *ctx.saved_tensors, ctx.eps, ctx.backend), None, None


_KEPT = "Tensor normalised, Tensor norms, Tensor nearest, Tensor pulls"
_backward = declare(
    f"koleo_backward(Tensor gradient, {_KEPT}, float eps, str backend) -> Tensor",
    kernels={
        **dict.fromkeys(NATIVE_DEVICES, _backward_native),
        **dict.fromkeys(TRITON_DEVICES, _backward_triton),
    },
    fake=_backward_fake,
)
_forward = declare(
    "koleo(Tensor x, float eps, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels={
        **dict.fromkeys(NATIVE_DEVICES, _forward_native),
        **dict.fromkeys(TRITON_DEVICES, _forward_triton),
    },
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_gradient,
)
