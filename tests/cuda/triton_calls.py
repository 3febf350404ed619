"""Calls that launch every Triton kernel of an op, with tensors that the caller makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dinov2_fast.ops import _attention_triton, _optimizer_triton

# A shape and a dtype -> a tensor; `torch.empty` is one.
Make = Callable[..., Tensor]

WIDTH, PROTOTYPES = 768, 65536
BFLOAT, HALF = torch.bfloat16, torch.float16


def layer_norm(make: Make) -> None:
    from dinov2_fast.kernels import layer_norm as kernels

    x, y, rows = make(64, WIDTH), make(32, WIDTH, dtype=BFLOAT), torch.arange(32)
    weight, rstd = make(WIDTH), make(32)
    kernels.forward(x, weight, weight, 1e-6, rows, y, None, rstd)
    kernels.backward(x, y, y, None, rstd, weight, weight, None, rows, add=True)


def stochastic_depth(make: Make) -> None:
    from dinov2_fast.kernels import stochastic_depth as kernels

    x, y, rows = make(64, WIDTH), make(32, WIDTH, dtype=BFLOAT), torch.arange(32)
    kernels.scatter_(x, y, rows, make(32), make(WIDTH))
    kernels.gather(x, rows, make(32), None, None, y, want_sums=True)


def gelu(make: Make) -> None:
    from dinov2_fast.kernels import gelu as kernels

    x, a = make(32, WIDTH, dtype=BFLOAT), make(32, WIDTH, dtype=BFLOAT)
    kernels.forward(x, a)
    kernels.backward(a, x, x, a, want_sums=True)


def swiglu(make: Make) -> None:
    from dinov2_fast.kernels import swiglu as kernels

    x12, h = make(32, 2 * WIDTH, dtype=BFLOAT), make(32, WIDTH, dtype=BFLOAT)
    kernels.forward(x12, h)
    kernels.backward(h, x12, x12, h, want_sums=True)


def sinkhorn(make: Make) -> None:
    from dinov2_fast.kernels import sinkhorn as kernels

    logits, log_u, log_v = make(32, PROTOTYPES, dtype=HALF), make(PROTOTYPES), make(32)
    kernels.columns(logits, log_v, 25.0, log_u, make(PROTOTYPES))
    kernels.rows(logits, log_u, 25.0, log_v)


def cross_entropy(make: Make) -> None:
    from dinov2_fast.kernels import cross_entropy as kernels

    student, teacher = make(32, PROTOTYPES, dtype=BFLOAT), make(16, PROTOTYPES, dtype=HALF)
    rows = torch.arange(64).view(32, 2) % 16
    arguments = (student, teacher, make(PROTOTYPES), make(16), rows, 0.1, 0.04)
    loss, normalizer, sums = make(32), make(32, dtype=torch.float64), make(32)
    kernels.forward(*arguments, loss, normalizer, sums)
    kernels.backward(loss, normalizer, sums, *arguments, student)


def koleo(make: Make) -> None:
    from dinov2_fast.kernels import koleo as kernels

    x, normalised, nearest = make(64, WIDTH), torch.zeros(64, WIDTH), torch.arange(64)
    losses, norms, pulls = make(64), make(64), make(64)
    kernels.forward(x, losses, normalised, norms, nearest, pulls, 1e-8)
    dx = torch.empty_like(normalised)  # which has no stride either
    kernels.backward(losses, normalised, norms, nearest, pulls, dx, 1e-8)


def optimizer(make: Make) -> None:
    lists = [[make(5000), make(64)] for _ in range(5)]
    _optimizer_triton.norm(lists[1])
    _optimizer_triton.step(
        *lists,
        lr=1e-3,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.99,
        eps=1e-8,
        step=3,
        momentum=0.99,
        gradient_scale=make(1),
        skip=torch.tensor(False),
    )


def attention(make: Make) -> None:
    """Of one launch each that takes a tile for a sequence, and several."""
    for length in (50, 70):
        q, k, v, out, d_out, *gradients = (make(length, 1, 64, dtype=BFLOAT) for _ in range(8))
        offsets = torch.tensor([0, length], dtype=torch.int32)
        call = (offsets, offsets, (0, 1, length, length, 0), 0.125)
        found, lse = _attention_triton.forward(q, k, v, *call)
        out.copy_(found)
        d_q, d_k, d_v = gradients
        _attention_triton.backward(d_out, q, k, v, out, lse, *call, d_q=d_q, d_k=d_k, d_v=d_v)


# Each with how many kernels it launches.
CALLS = {
    attention: 2 + 3,
    cross_entropy: 2,
    gelu: 2,
    koleo: 4,
    layer_norm: 2,
    optimizer: 2,
    sinkhorn: 2,
    stochastic_depth: 2,
    swiglu: 2,
}
