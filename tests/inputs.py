"""Sizes that tests share, each with its reason, and makers of seeded inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_fast import backends, native
from dinov2_fast.packing import Pack

# Runs (num_sequences, length) of packs.
GROUPS = [
    ((2, 257), (2, 50)),  # two 224 px and two 98 px crops at patch 14: the production pack
    ((1, 1),),  # a single token: no neighbour to hide a wrong offset
    ((1, 64), (1, 65)),  # a tile edge and one past it
    ((3, 17), (1, 0), (2, 5)),  # primes around an empty sequence
    (),  # nothing at all
]

# (rows, channels) of row-wise ops.
ROW_SHAPES = [
    (257, 384),  # one 224 px crop of ViT-S/14
    (1, 1),  # nothing to hide behind
    (13, 61),  # primes: no vector width divides them
    (33, 129),  # one past a tile edge in both
    (0, 64),  # an empty branch
]

# (rows, prototypes) of the ops on teacher and student scores.
SCORE_SHAPES = [
    (64, 4096),  # several blocks of rows
    (1, 1),  # one row, one prototype
    (7, 31),  # primes
    (17, 257),  # one past a tile edge
    (16, 8191),  # two of the longest steps along a row, less one
    pytest.param((8, 65537), marks=pytest.mark.slow),  # prototypes of a head, and one
]

# Smallest sizes on which gradcheck still sees several sequences and several channels.
GRADCHECK_GROUPS = ((2, 3), (1, 1), (1, 2))

DTYPES = [torch.float32, torch.bfloat16]

# Tracing with autograd is what an op can break and takes a second; code generation takes twenty.
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Normal numbers that depend on the seed and the shape alone, not on dtype or device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)


def randperm(count: int, *, seed: int = 0, device: str = "cpu") -> Tensor:
    """A seeded permutation of count numbers."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(device)


def make_qkv(
    pack: Pack, *, num_heads: int = 2, head_dim: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values [T, H, D]: strided views of one tensor, as a qkv layer gives them."""
    qkv = randn(pack.num_tokens, 3, num_heads, head_dim, dtype=dtype, device=str(pack.device))
    q, k, v = qkv.unbind(1)
    return q, k, v


def score_rounding(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> float:
    """What rounding may leave of the gradients of queries and keys that are 0 in theory.

    The gradient of a score is weight * (d_out . v - sum of d_out * out). With one key out is v, and
    the difference is of two float32 sums of D equal products, which a GPU adds in different orders.
    """
    if q.numel() == 0:
        return 0.0
    products = (d_out.double() * v.double()).abs().sum(-1).max()
    of_score = 2 * v.shape[-1] * torch.finfo(torch.float32).eps * products
    return float(of_score * scale * torch.stack([q, k]).abs().max())


def float_types(op: str, backend: str, device: str) -> tuple[torch.dtype, ...]:
    """Float types that a backend takes on a device, widest first; the reference's are `DTYPES`."""
    place = "cuda" if backend == "triton" else native.place_of(backend, device)
    taken = backends.DTYPES.get((op, backend, place), tuple(DTYPES))
    return tuple(sorted(taken, key=lambda dtype: -torch.finfo(dtype).bits))


def leaves(*tensors: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies that collect gradients, with the strides of the originals."""
    return [
        tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors
    ]
