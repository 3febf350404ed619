"""Calls that launch every Triton kernel of an op, with tensors that the caller makes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dinov2_fast.ops import _attention_triton, _optimizer_triton

# A shape and a dtype -> a tensor; `torch.empty` is one.
Make = Callable[..., Tensor]
# What a call computes into tensors that it does not get from its caller.
Sums = tuple[Tensor | None, ...]
Call = Callable[[Make], Sums]

# Rows of a branch, its width, and prototypes; tests set them to others.
ROWS, WIDTH, PROTOTYPES = 32, 768, 65536
BFLOAT, HALF = torch.bfloat16, torch.float16


def layer_norm(make: Make) -> Sums:
    """Gathered rows of the stream to a branch's type, and the gradient added to those rows."""
    from dinov2_fast.kernels import layer_norm as kernels

    x, y, rows = make(2 * ROWS, WIDTH), make(ROWS, WIDTH, dtype=BFLOAT), torch.arange(ROWS)
    weight, rstd = make(WIDTH), make(ROWS)
    kernels.forward(x, weight, weight, 1e-6, rows, y, None, rstd)
    return (kernels.backward(x, y, y, None, rstd, weight, weight, None, rows, add=True),)


def stochastic_depth(make: Make) -> Sums:
    """A branch added into the stream, and its gradient gathered with the sums for its scale."""
    from dinov2_fast.kernels import stochastic_depth as kernels

    x, y, rows = make(2 * ROWS, WIDTH), make(ROWS, WIDTH, dtype=BFLOAT), torch.arange(ROWS)
    kernels.scatter_(x, y, rows, make(ROWS), make(WIDTH))
    return (kernels.gather(x, rows, make(ROWS), None, None, y, want_sums=True),)


def gelu(make: Make) -> Sums:
    """The backward in place, with sums for the bias."""
    from dinov2_fast.kernels import gelu as kernels

    x, a = make(ROWS, WIDTH, dtype=BFLOAT), make(ROWS, WIDTH, dtype=BFLOAT)
    kernels.forward(x, a)
    return (kernels.backward(a, x, x, a, want_sums=True),)


def swiglu(make: Make) -> Sums:
    """The backward in place, with sums for the bias."""
    from dinov2_fast.kernels import swiglu as kernels

    x12, h = make(ROWS, 2 * WIDTH, dtype=BFLOAT), make(ROWS, WIDTH, dtype=BFLOAT)
    kernels.forward(x12, h)
    return (kernels.backward(h, x12, x12, h, want_sums=True),)


def sinkhorn(make: Make) -> Sums:
    """Half-precision scores of every prototype, down and along."""
    from dinov2_fast.kernels import sinkhorn as kernels

    logits, log_u, log_v = make(ROWS, PROTOTYPES, dtype=HALF), make(PROTOTYPES), make(ROWS)
    kernels.columns(logits, log_v, 25.0, log_u, make(PROTOTYPES))
    kernels.rows(logits, log_u, 25.0, log_v)
    return ()


def cross_entropy(make: Make) -> Sums:
    """Two teachers a student, scores of two types, the gradient in place."""
    from dinov2_fast.kernels import cross_entropy as kernels

    student, teacher = make(ROWS, PROTOTYPES, dtype=BFLOAT), make(ROWS // 2, PROTOTYPES, dtype=HALF)
    rows = torch.arange(2 * ROWS).view(ROWS, 2) % (ROWS // 2)
    arguments = (student, teacher, make(PROTOTYPES), make(ROWS // 2), rows, 0.1, 0.04)
    loss, normalizer, sums = make(ROWS), make(ROWS, dtype=torch.float64), make(ROWS)
    kernels.forward(*arguments, loss, normalizer, sums)
    kernels.backward(loss, normalizer, sums, *arguments, student)
    return ()


def koleo(make: Make) -> Sums:
    """All four kernels on rows of one image each."""
    from dinov2_fast.kernels import koleo as kernels

    x, normalised = make(2 * ROWS, WIDTH), torch.zeros(2 * ROWS, WIDTH)
    nearest = torch.arange(2 * ROWS)
    losses, norms, pulls = make(2 * ROWS), make(2 * ROWS), make(2 * ROWS)
    kernels.forward(x, losses, normalised, norms, nearest, pulls, 1e-8)
    dx = torch.empty_like(normalised)  # which has no stride either
    kernels.backward(losses, normalised, norms, nearest, pulls, dx, 1e-8)
    return normalised, dx


def optimizer(make: Make, *, skip: bool = False) -> Sums:
    """A step with everything it can have, and the norm of two gradients."""
    lists = [[make(5000), make(64)] for _ in range(5)]
    norm = _optimizer_triton.norm(lists[1])  # the gradients
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
        skip=torch.tensor(skip),
    )
    return (norm,)


def attention(
    make: Make,
    *,
    head_dim: int = 64,
    dtype: torch.dtype = BFLOAT,
    lengths: Sequence[int] = (50, 70),
) -> Sums:
    """Of one sequence each: by default one that a tile holds whole, and one that takes several."""
    sums: list[Tensor] = []
    for length in lengths:
        q, k, v, out, d_out, *gradients = (make(length, 1, head_dim, dtype=dtype) for _ in range(8))
        offsets = torch.tensor([0, length], dtype=torch.int32)
        call = (offsets, offsets, (0, 1, length, length, 0), 0.125)
        found, lse = _attention_triton.forward(q, k, v, *call)
        out.copy_(found)
        sums.append(lse)
        d_q, d_k, d_v = gradients
        _attention_triton.backward(d_out, q, k, v, out, lse, *call, d_q=d_q, d_k=d_k, d_v=d_v)
    return tuple(sums)


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

# Head dimensions with their types: powers of two, and of what is padded to one those of so400m and
# ViT-H. 40 and 96 have their tiles, and half precision the code of bfloat16.
HEADS = [
    *((head_dim, BFLOAT) for head_dim in (32, 64, 72, 80, 128)),
    (64, HALF),
    *((head_dim, torch.float32) for head_dim in (64, 80)),
]
# Lengths by which attention takes each of its tiles.
LENGTHS = (16, 50, 70, 600)


def attention_of(head_dim: int, dtype: torch.dtype) -> Call:
    """A call of every attention kernel at every length that has a tile of its own."""
    return functools.partial(attention, head_dim=head_dim, dtype=dtype, lengths=LENGTHS)
