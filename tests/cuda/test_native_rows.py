"""The CUDA kernels that work row by row, launched by their host code and executed as PTX.

Every claim is made of each op; `ops` has how an op's functions are called and what they return.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast.ops.gelu import gelu, gelu_backward_
from dinov2_fast.ops.layer_norm import layer_norm_backward_, layer_norm_forward
from dinov2_fast.ops.stochastic_depth import gather_scaled, scatter_add_scaled_
from dinov2_fast.ops.swiglu import swiglu, swiglu_backward_
from tests.cuda import native_on_ptx
from tests.inputs import randn, randperm
from tests.tolerance import assert_within_error_budget
from tools.simt import Fault

pytestmark = pytest.mark.skipif(bool(native_on_ptx.why_not()), reason=native_on_ptx.why_not())

Place = Callable[[Tensor], Tensor]
Outputs = dict[str, Tensor]

# Types of the residual stream, and of what a branch works in.
TYPES = [
    (torch.float32, torch.bfloat16),  # how a model trains
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
STREAM_WIDTHS = (384, 768, 1024, 1536)  # ViT-S, B, L, g
HIDDEN_WIDTHS = (1536, 3072, 4096, 8192)  # ViT-S, B and g; the largest that is promised
ROWS = 11  # a prime, more than the 8 rows of a tile
EDGES = [
    (1, 1),  # nothing to hide behind
    (13, 61),  # primes: no vector width divides them
    (9, 264),  # one row past a tile, and one vector past 32 lanes
    (2, 2056),  # more vectors than a CTA has threads
]


def run_layer_norm(sizes: tuple[int, int], types: Any, place: Place, backend: str) -> Outputs:
    """Forward of gathered rows, and the backward added to them; types of stream and branch."""
    rows, width = sizes
    x = place((randn(2 * rows, width, scale=3.0) + 2).to(types[0]))
    dx = place(randn(2 * rows, width, seed=5).to(types[0]))
    wide = torch.promote_types(types[0], torch.float32)
    weight = (1 + randn(width, seed=1, scale=0.1)).to(wide)
    bias = randn(width, seed=2, scale=0.1).to(wide)
    kept = randperm(2 * rows)[:rows]
    dy = place(randn(rows, width, seed=3).to(types[1]))
    options = {"rows": kept, "backend": backend}
    y, rstd = layer_norm_forward(x, weight, bias, eps=1e-6, out_dtype=types[1], **options)
    dweight, dbias = layer_norm_backward_(dx, dy, place(y), rstd, weight, bias, **options)
    return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}


def run_stochastic_depth(sizes: tuple[int, int], types: Any, place: Place, backend: str) -> Outputs:
    """A branch's output added to kept rows, and their gradient gathered."""
    rows, width = sizes
    x = place(randn(2 * rows, width).to(types[0]))
    residual = place(randn(rows, width, seed=1).to(types[1]))
    scale = 1 + randn(rows, seed=2).square()
    gamma = randn(width, seed=3).to(types[1])
    kept = randperm(2 * rows)[:rows]
    scatter_add_scaled_(x, residual, kept, scale, gamma, backend=backend)
    dx = place(randn(2 * rows, width, seed=4).to(types[0]))
    g, sums = gather_scaled(dx, kept, scale, out_dtype=types[1], backend=backend)
    return {"x": x, "g": g, "sums": sums}


def run_gelu(sizes: tuple[int, int], types: Any, place: Place, backend: str) -> Outputs:
    """Forward, and the backward in place."""
    x = place(randn(*sizes, scale=2.0).to(types[1]))
    da = place(randn(*sizes, seed=1).to(types[1]))
    a = gelu(x, backend=backend)
    sums = gelu_backward_(da, x, backend=backend)
    return {"a": a, "dx": x, "a again": da, "sums": sums}


def run_swiglu(sizes: tuple[int, int], types: Any, place: Place, backend: str) -> Outputs:
    """Forward, and the backward in place."""
    rows, hidden = sizes
    x12 = place(randn(rows, 2 * hidden, scale=2.0).to(types[1]))
    dh = place(randn(rows, hidden, seed=1).to(types[1]))
    h = swiglu(x12, backend=backend)
    sums = swiglu_backward_(dh, x12, backend=backend)
    return {"h": h, "dx12": x12, "h again": dh, "sums": sums}


OPS = {
    "layer_norm": (run_layer_norm, STREAM_WIDTHS),
    "stochastic_depth": (run_stochastic_depth, STREAM_WIDTHS),
    "gelu": (run_gelu, HIDDEN_WIDTHS),
    "swiglu": (run_swiglu, HIDDEN_WIDTHS),
}


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor.clone()


def in_poison(storages: list[tuple[Tensor, Tensor]], offset: int) -> Place:
    """Places matrices in rows with NaN between, `offset` elements past a multiple of 16 bytes."""

    def place(tensor: Tensor) -> Tensor:
        rows, width = tensor.shape
        stride = width + 16 // tensor.element_size()  # keeps rows at multiples of 16 bytes
        storage = torch.full((offset + rows * stride + 1,), float("nan"), dtype=tensor.dtype)
        view = storage[offset:].as_strided((rows, width), (stride, 1), offset)
        view.copy_(tensor)
        storages.append((storage, view))
        return view

    return place


def execute(
    op: str, sizes: tuple[int, int], types: Any, place: Place = as_it_is, **options: Any
) -> tuple[Outputs, list[Any]]:
    """What the CUDA kernels compute, and the results of their launches."""
    with native_on_ptx.native_on_ptx(**options) as results:
        return OPS[op][0](sizes, types, place, "native"), results


def assert_matches_reference(op: str, sizes: tuple[int, int], types: Any, out: Outputs) -> None:
    """Errors are within twice those of the reference in the same types."""
    low = OPS[op][0](sizes, types, as_it_is, "reference")
    truth = OPS[op][0](sizes, (torch.float64, torch.float64), as_it_is, "reference")
    for name, tensor in out.items():
        assert_within_error_budget(
            tensor, low_precision=low[name], truth=truth[name], name=f"{op}.{name}"
        )


def equal(a: Outputs, b: Outputs) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("op", "width", "arch"),
    [
        pytest.param(op, width, arch, marks=[] if quick else [pytest.mark.slow])
        for op, (_, widths) in OPS.items()
        for index, width in enumerate(widths)
        for arch in (80, 90)
        for quick in [index == 2 and arch == 80]
    ],
)
def test_production_widths_match_the_reference_in_any_order(op: str, width: int, arch: int):
    sizes = ROWS, width
    out, results = execute(op, sizes, TYPES[0], arch=arch)
    assert len(results) == 2
    assert_matches_reference(op, sizes, TYPES[0], out)
    shuffled, _ = execute(op, sizes, TYPES[0], arch=arch, schedule=1)
    assert equal(out, shuffled)


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("sizes", EDGES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_edges_of_aligned_and_unaligned_rows_match_the_reference(
    op: str, sizes: tuple[int, int], types: Any
):
    storages: list[tuple[Tensor, Tensor]] = []
    for offset in (0, 1):
        out, _ = execute(op, sizes, types, in_poison(storages, offset))
        assert_matches_reference(op, sizes, types, out)
    for storage, view in storages:
        view.fill_(float("nan"))
        assert storage.isnan().all()  # what lies between the rows was left alone


@pytest.mark.parametrize("op", OPS)
def test_no_rows_are_no_launch(op: str):
    out, results = execute(op, (0, 64), TYPES[0])
    assert not results
    assert_matches_reference(op, (0, 64), TYPES[0], out)


@pytest.mark.parametrize("op", OPS)
def test_nan_in_a_row_stays_in_its_row(op: str):
    poisoned = 3  # of the rows; gathered ones are read by place in the stream

    def poison(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[poisoned] = float("nan")
        return tensor

    clean, _ = execute(op, (ROWS, 64), TYPES[0])
    dirty, _ = execute(op, (ROWS, 64), TYPES[0], poison)
    for name, tensor in dirty.items():
        if tensor.ndim == 2:
            bad = tensor.isnan().any(1)
            assert 1 <= bad.sum() <= 2  # the row itself, and the stream's row of that number
            assert torch.equal(tensor[~bad], clean[name][~bad])


@pytest.mark.parametrize("op", OPS)
def test_warps_touch_whole_sectors(op: str):
    types = TYPES[0] if op in ("gelu", "swiglu") else TYPES[4]
    _, results = execute(op, (ROWS, 1024), types, profile=True)
    for result in results:
        for kind in ("load", "store"):
            sectors = result.counters[f"global sectors, {kind}"]
            wasted = sectors * 32 - result.counters[f"global bytes, {kind}"]
            # One number a row (its row in the stream, a statistic) takes a sector of its own.
            assert wasted <= 32 * 4 * ROWS
            passes = result.counters.get(f"shared passes, {kind}", 0)
            assert passes == result.counters.get(f"shared passes, {kind}, ideal", 0)


@pytest.mark.parametrize("op", OPS)
def test_every_deleted_barrier_is_reported(op: str):
    sizes = (ROWS, 512)  # several warps, several rows a CTA where rows share one
    _, results = execute(op, sizes, TYPES[0])
    deletions = list(native_on_ptx.deletions(results))
    assert deletions
    for edit in deletions:
        with pytest.raises(Fault):
            execute(op, sizes, TYPES[0], edit=edit)
