"""KoLeo's kernels, CUDA's and Triton's, executed as PTX forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinov2_fast.ops import koleo as op
from dinov2_fast.ops._native_cuda import run_cuda
from tests.cuda import native_on_ptx
from tests.tolerance import assert_within_error_budget

EPS = 1e-8
# Batch sizes of each tile's kernel, neither of whole tiles; of three splits of the small one the
# last is empty. Of Triton's 16 parts the large one fills the first eight, each with two tiles.
SMALL, LARGE = 19, 515
# By name: losses, nearest rows, gradient, normalised rows.
Outputs = dict[str, Tensor]


def native(x: Tensor, *, num_splits: int = 3, **options: Any) -> tuple[Outputs, list[Any]]:
    """What CUDA's kernels compute of strided rows, forward and backward, and their launches."""
    rows, channels = x.shape
    losses, norms, pulls = (torch.full((rows,), torch.nan) for _ in range(3))
    normalised, dx = (torch.full((rows, channels), torch.nan) for _ in range(2))
    nearest = torch.full((rows,), -1)
    bests = torch.full((rows, num_splits), -1)
    kept = {"normalised": normalised, "norms": norms, "nearest": nearest, "pulls": pulls}
    kept |= {"rows": rows, "channels": channels, "eps": EPS}
    sizes: Any = {"num_splits": num_splits, "x_row_stride": x.stride(0)}
    with native_on_ptx.native_on_ptx(**options) as results:
        run_cuda("koleo_forward_cuda", x=x, losses=losses, bests=bests, **kept, **sizes)
        gradients = torch.full((rows,), 1 / rows)
        run_cuda("koleo_backward_cuda", gradients=gradients, dx=dx, **kept)
    return {"losses": losses, "nearest": nearest, "dx": dx, "normalised": normalised}, results


def triton(x: Tensor, *, arch: int = 80, **options: Any) -> tuple[Outputs, list[Any]]:
    """As `native`, of Triton's kernels."""
    from dinov2_fast.kernels import koleo as kernels
    from tools.simt.triton_launch import triton_on_cpu

    losses, norms, pulls = (torch.full((x.shape[0],), torch.nan) for _ in range(3))
    normalised, dx = (torch.full(tuple(x.shape), torch.nan) for _ in range(2))
    nearest = torch.full((x.shape[0],), -1)
    with triton_on_cpu(arch, **options) as results:
        kernels.forward(x, losses, normalised, norms, nearest, pulls, EPS)
        gradients = torch.full((x.shape[0],), 1 / x.shape[0])
        kernels.backward(gradients, normalised, norms, nearest, pulls, dx, EPS)
    return {"losses": losses, "nearest": nearest, "dx": dx, "normalised": normalised}, results


def among_nan(x: Tensor) -> Tensor:
    """A copy of rows further apart than they are long, with NaN in between."""
    rows, channels = x.shape
    wide = torch.full((rows, channels + 4), torch.nan)
    wide[:, :channels] = x
    return wide[:, :channels]


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    leaf = x.clone().requires_grad_()
    loss = op.koleo_reference(leaf, eps=EPS)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def assert_matches_reference(x: Tensor, out: Outputs) -> None:
    """Errors of the losses' mean and of dx are within twice those of the reference in float32."""
    low, truth = reference(x), reference(x.double())
    for name, found, low_precision, exact in (
        ("loss", out["losses"].double().mean().float(), low[0], truth[0]),
        ("gradient", out["dx"], low[1], truth[1]),
    ):
        assert_within_error_budget(
            found, low_precision=low_precision, truth=exact, name=f"koleo.{name}"
        )


def same(a: Outputs, b: Outputs) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)
