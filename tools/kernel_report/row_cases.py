"""Calls that reach every instance of the kernels that work row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_fast.ops.gelu import gelu, gelu_backward_
from dinov2_fast.ops.layer_norm import layer_norm_backward_, layer_norm_forward
from dinov2_fast.ops.stochastic_depth import gather_scaled, scatter_add_scaled_
from dinov2_fast.ops.swiglu import swiglu, swiglu_backward_
from tools.kernel_report.cases import Calls, Case, Place, Run, Types, normal

# Types of the residual stream, and of what a branch works in.
STREAM_AND_BRANCH: list[Types] = [
    (torch.float32, torch.bfloat16),  # how a model trains
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
EVERY_FLOAT: list[Types] = [
    (torch.bfloat16,) * 2,
    (torch.float16,) * 2,
    (torch.float32,) * 2,
]


def kept_rows(rows: int) -> Tensor:
    """As many rows of a stream of twice as many, in no order."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(2 * rows, generator=generator, device="cpu")
    return order[:rows].to(torch.get_default_device())


def run_layer_norm(sizes: tuple[int, int], types: Types, place: Place, backend: str) -> Calls:
    """Forward of gathered rows, and the backward added to them."""
    rows, width = sizes
    # A mean that the difference of two sums of squares would lose.
    x = place((normal(2 * rows, width, scale=3.0) + 30).to(types[0]))
    dx = place(normal(2 * rows, width, seed=5).to(types[0]))
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = (1 + normal(width, seed=1, scale=0.1)).to(wide)
    # Of few bits: a row of one channel is its bias, and one that is rounded has a gradient.
    bias = normal(width, seed=2, scale=0.1).to(types[1]).to(wide)
    kept = kept_rows(rows)
    dy = place(normal(rows, width, seed=3).to(types[1]))
    y, rstd = layer_norm_forward(
        x, weight, bias, eps=1e-6, out_dtype=dy.dtype, rows=kept, backend=backend
    )
    yield "forward", {"y": y, "rstd": rstd}
    # The backward is given the same output whatever has computed it.
    inputs = (tensor.double() for tensor in (x, weight, bias))
    y, rstd = layer_norm_forward(*inputs, eps=1e-6, rows=kept, backend="reference")
    dweight, dbias = layer_norm_backward_(
        *(dx, dy, place(y.to(types[1])), rstd.float().to(wide), weight, bias),
        rows=kept,
        backend=backend,
    )
    yield "backward", {"dx": dx, "dweight": dweight, "dbias": dbias}


def run_stochastic_depth(sizes: tuple[int, int], types: Types, place: Place, backend: str) -> Calls:
    """A branch's output added to kept rows, and their gradient gathered."""
    rows, width = sizes
    x = place(normal(2 * rows, width).to(types[0]))
    residual = place(normal(rows, width, seed=1).to(types[1]))
    scale = 1 + normal(rows, seed=2).square()
    gamma = normal(width, seed=3).to(types[1]).to(residual.dtype)
    kept = kept_rows(rows)
    scatter_add_scaled_(x, residual, kept, scale, gamma, backend=backend)
    yield "scatter", {"x": x}
    dx = place(normal(2 * rows, width, seed=4).to(types[0]))
    g, sums = gather_scaled(dx, kept, scale, out_dtype=residual.dtype, backend=backend)
    yield "gather", {"g": g, "sums": sums}


def run_gelu(sizes: tuple[int, int], types: Types, place: Place, backend: str) -> Calls:
    """Forward, and the backward in place."""
    x = place(normal(*sizes, scale=2.0).to(types[1]))
    da = place(normal(*sizes, seed=1).to(types[1]))
    yield "forward", {"a": gelu(x, backend=backend)}
    sums = gelu_backward_(da, x, backend=backend)
    yield "backward", {"dx": x, "a again": da, "sums": sums}


def run_swiglu(sizes: tuple[int, int], types: Types, place: Place, backend: str) -> Calls:
    """Forward, and the backward in place."""
    rows, hidden = sizes
    x12 = place(normal(rows, 2 * hidden, scale=2.0).to(types[1]))
    dh = place(normal(rows, hidden, seed=1).to(types[1]))
    yield "forward", {"h": swiglu(x12, backend=backend)}
    sums = swiglu_backward_(dh, x12, backend=backend)
    yield "backward", {"dx12": x12, "h again": dh, "sums": sums}


# Two tiles of 8 rows of ViT-S's hidden width, moved in vectors; a prime width, in elements.
_SIZES = ((16, 1536), (16, 383))


def _cases(run: Run, types: list[Types]) -> list[Case]:
    return [Case(run, sizes, each) for sizes in _SIZES for each in types]


CASES: dict[str, list[Case]] = {
    "gelu": _cases(run_gelu, EVERY_FLOAT),
    "layer_norm": _cases(run_layer_norm, STREAM_AND_BRANCH),
    "stochastic_depth": _cases(run_stochastic_depth, STREAM_AND_BRANCH),
    "swiglu": _cases(run_swiglu, EVERY_FLOAT),
}
