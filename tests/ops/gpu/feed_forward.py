"""What the tests of GELU's and of SwiGLU's kernels for a GPU ask alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.inputs import leaves, randn
from tests.tolerance import assert_within_error_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_pack_is_within_budget(
    forward: Callable[..., Tensor],
    backward_: Callable[..., Tensor],
    widths: tuple[int, int],
    dtype: torch.dtype,
    kernels: str,
    device: str,
    num_images: int,
) -> None:
    """Compare activation, and the backward in place, on the tokens of a pack of crops.

    Args:
        forward: of the op.
        backward_: of the op, in place.
        widths: of the op's input and output.
        dtype: of both.
        kernels: the backend.
        device: where it computes.
        num_images: of the pack; 0 is five tokens.
    """
    tokens = num_images * (2 * 257 + 8 * 50) or 5
    x = randn(tokens, widths[0], dtype=dtype, device=device, scale=2.0)
    gradient = randn(tokens, widths[1], dtype=dtype, device=device, seed=1)

    def outputs(x: Tensor, gradient: Tensor, backend: str) -> list[Tensor]:
        """Activation; then gradient, activation and sums of the backward in place."""
        dx, activation = x.clone(), gradient.clone()
        sums = backward_(activation, dx, backend=backend)
        return [forward(x, backend=backend), dx, activation, sums]

    found, low = (outputs(x, gradient, backend) for backend in (kernels, "reference"))
    truth = outputs(x.double(), gradient.double(), "reference")
    names = ("forward", "dx", "activation", "sums")
    for name, out, one, exact in zip(names, found, low, truth, strict=True):
        assert_within_error_budget(out, low_precision=one, truth=exact, name=name)
    assert all(map(torch.equal, found, outputs(x, gradient, kernels)))  # sums have one order


def assert_gradient_is_within_budget(
    forward: Callable[..., Tensor], out_width: int, dtype: torch.dtype, kernels: str, device: str
) -> None:
    """Compare the gradient by autograd of strided rows of 192 columns."""
    wide = randn(37, 2 * 96 + 8, dtype=dtype, device=device, scale=2.0)
    incoming = randn(37, out_width, dtype=dtype, device=device, seed=1)

    def gradient(x: Tensor, backend: str) -> Tensor:
        (leaf,) = leaves(x)
        return torch.autograd.grad(forward(leaf, backend=backend), leaf, incoming.to(x.dtype))[0]

    x = wide[:, 4:-4]
    assert_within_error_budget(
        gradient(x, kernels),
        low_precision=gradient(x, "reference"),
        truth=gradient(x.double(), "reference"),
        name="dx",
    )
