"""The CUDA kernels that work row by row, launched by their host code and executed as PTX.

Every claim is made of each op; `ops` has how an op's functions are called and what they return.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast.ops import _layer_norm_native, _native_cuda
from dinov2_fast.ops.gelu import gelu
from dinov2_fast.ops.layer_norm import layer_norm, layer_norm_backward_, layer_norm_forward
from dinov2_fast.ops.stochastic_depth import (
    gather_rows,
    gather_scaled,
    scatter_add_scaled,
    scatter_add_scaled_,
)
from dinov2_fast.ops.swiglu import swiglu
from tests.cuda import native_on_ptx
from tests.tolerance import assert_within_error_budget
from tools.kernel_report.cases import Place, as_it_is, exactly, normal
from tools.kernel_report.row_cases import (
    STREAM_AND_BRANCH,
    kept_rows,
    run_gelu,
    run_layer_norm,
    run_stochastic_depth,
    run_swiglu,
)
from tools.simt import Fault

pytestmark = pytest.mark.skipif(bool(native_on_ptx.why_not()), reason=native_on_ptx.why_not())

Outputs = dict[str, Tensor]

STREAM_WIDTHS = (384, 768, 1024, 1536)  # ViT-S, B, L, g
HIDDEN_WIDTHS = (1536, 3072, 4096, 8192)  # ViT-S, B and g; the largest that is promised
ROWS = 11  # a prime, more than the 8 rows of a tile
EDGES = [
    (1, 1),  # nothing to hide behind
    (13, 61),  # primes: no vector width divides them
    (9, 264),  # one row past a tile, and one vector past 32 lanes
    (2, 2056),  # more vectors than a CTA has threads
]

OPS = {
    "layer_norm": (run_layer_norm, STREAM_WIDTHS),
    "stochastic_depth": (run_stochastic_depth, STREAM_WIDTHS),
    "gelu": (run_gelu, HIDDEN_WIDTHS),
    "swiglu": (run_swiglu, HIDDEN_WIDTHS),
}


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


def called(op: str, sizes: tuple[int, int], types: Any, place: Place, backend: str) -> Outputs:
    """What all calls of an op returned."""
    calls = OPS[op][0](sizes, types, place, backend)
    return {name: tensor for _, outputs in calls for name, tensor in outputs.items()}


def execute(
    op: str, sizes: tuple[int, int], types: Any, place: Place = as_it_is, **options: Any
) -> tuple[Outputs, list[Any]]:
    """What the CUDA kernels compute, and the results of their launches."""
    with native_on_ptx.native_on_ptx(**options) as results:
        return called(op, sizes, types, place, "native"), results


def assert_matches_reference(op: str, sizes: tuple[int, int], types: Any, out: Outputs) -> None:
    """Errors are within twice those of the reference in the same types."""
    low = called(op, sizes, types, as_it_is, "reference")
    truth = called(op, sizes, types, exactly, "reference")
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
    out, results = execute(op, sizes, STREAM_AND_BRANCH[0], arch=arch)
    assert len(results) == 2
    assert_matches_reference(op, sizes, STREAM_AND_BRANCH[0], out)
    shuffled, _ = execute(op, sizes, STREAM_AND_BRANCH[0], arch=arch, schedule=1)
    assert equal(out, shuffled)


@pytest.mark.parametrize("op", OPS)
def test_order_changes_no_bit_of_rows_of_elements(op: str):
    sizes = 9, 61  # one row past a tile, moved element by element
    out, _ = execute(op, sizes, STREAM_AND_BRANCH[0])
    shuffled, _ = execute(op, sizes, STREAM_AND_BRANCH[0], schedule=1)
    assert equal(out, shuffled)


@pytest.mark.parametrize("types", STREAM_AND_BRANCH, ids=str)
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


def gradients_of(out: Tensor, **leaves: Tensor) -> Outputs:
    """The output and the gradients of leaves, for one gradient of the output."""
    found = torch.autograd.grad(out, list(leaves.values()), normal(*out.shape, seed=9).to(out))
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


def plain_layer_norm(dtype: torch.dtype, backend: str) -> Outputs:
    """Gradients of an input, of all rows and of some; and of normalised rows, of all."""
    x = (normal(ROWS, 80, scale=3.0) + 2).to(dtype)[:, :72].requires_grad_()
    weight = (1 + normal(72, seed=1, scale=0.1)).to(dtype).requires_grad_()
    bias = normal(72, seed=2, scale=0.1).to(dtype).requires_grad_()
    outputs: Outputs = {}
    for rows in (None, kept_rows(ROWS // 2)):
        y = layer_norm(x, weight, bias, rows=rows, backend=backend)
        found = gradients_of(y, x=x, weight=weight, bias=bias)
        outputs |= {f"{name}, rows {rows}": tensor for name, tensor in found.items()}
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    dx, dy = (normal(ROWS, 72, seed=seed).to(dtype) for seed in (3, 4))
    one, zero = torch.ones_like(weight), torch.zeros_like(bias)
    normalised, rstd = layer_norm_forward(x, one, zero, eps=1e-6, backend=backend)
    sums = layer_norm_backward_(
        dx, dy, normalised, rstd, weight, bias, normalised=normalised, backend=backend
    )
    return outputs | {"normalised": normalised, "dx": dx, "dweight": sums[0], "dbias": sums[1]}


def plain_stochastic_depth(dtype: torch.dtype, backend: str) -> Outputs:
    """Gradients of a scaled branch; sums and copies of rows without what scales or chooses them."""
    x, every = (normal(2 * ROWS, 72, seed=seed).to(dtype) for seed in (0, 1))
    residual = normal(ROWS, 80, seed=2).to(dtype)[:, :72].requires_grad_()
    gamma = normal(72, seed=3).to(dtype).requires_grad_()
    scale, kept = 1 + normal(ROWS, seed=4).square(), kept_rows(ROWS)
    out = scatter_add_scaled(x, residual, kept, scale, gamma, backend=backend)
    outputs = gradients_of(out, residual=residual, gamma=gamma)
    outputs["rows"] = gather_rows(x, kept, backend=backend)
    outputs["g"], outputs["sums"] = gather_scaled(x, None, None, backend=backend)
    outputs["x"] = x.clone()  # x itself may be what was gathered
    scatter_add_scaled_(outputs["x"], every, None, None, None, backend=backend)
    return outputs


def plain_gelu(dtype: torch.dtype, backend: str) -> Outputs:
    """A gradient that needs no activation and no sums; from where the density is 0 to past it."""
    x = normal(ROWS, 72, scale=8.0).to(dtype)
    x[0, :4] = torch.tensor([-1e30, 1e30, -20.0, 20.0])
    x.requires_grad_()
    return gradients_of(gelu(x, backend=backend), x=x)


def plain_swiglu(dtype: torch.dtype, backend: str) -> Outputs:
    """A gradient that needs no product and no sums; gates so far from 0 that exp would overflow."""
    x12 = normal(ROWS, 144, scale=2.0).to(dtype)
    x12[0, :4] = torch.tensor([-200.0, 200.0, -89.0, 89.0])
    x12.requires_grad_()
    return gradients_of(swiglu(x12, backend=backend), x12=x12)


PLAIN = {
    "layer_norm": plain_layer_norm,
    "stochastic_depth": plain_stochastic_depth,
    "gelu": plain_gelu,
    "swiglu": plain_swiglu,
}


@pytest.mark.parametrize("op", PLAIN)
def test_calls_that_leave_arguments_out_match_the_reference(op: str):
    with native_on_ptx.native_on_ptx() as results:
        out = PLAIN[op](torch.float32, "native")
    assert results
    low, truth = PLAIN[op](torch.float32, "reference"), PLAIN[op](torch.float64, "reference")
    for name, tensor in out.items():
        assert_within_error_budget(
            tensor, low_precision=low[name], truth=truth[name], name=f"{op}.{name}"
        )


def test_rows_too_long_for_four_in_shared_memory_match_the_reference():
    # Three CTAs' rows of which the last has two of its three.
    sizes = 8, 4096
    out, _ = execute("layer_norm", sizes, STREAM_AND_BRANCH[0])
    assert_matches_reference("layer_norm", sizes, STREAM_AND_BRANCH[0], out)


def test_a_row_of_one_channel_has_no_gradient():
    # Its output is its bias. What rounding leaves of their difference would be scaled up by rstd.
    weight, bias = torch.tensor([1.0]), torch.tensor([0.1])
    dx, dy, y = torch.zeros(1, 1), torch.ones(1, 1).bfloat16(), bias.bfloat16().view(1, 1)
    with native_on_ptx.native_on_ptx():
        layer_norm_backward_(dx, dy, y, torch.tensor([1e3]), weight, bias, backend="native")
    assert dx.item() == 0


@pytest.mark.parametrize("op", OPS)
def test_sums_over_several_rows_of_a_thread_match_the_reference(
    op: str, monkeypatch: pytest.MonkeyPatch
):
    # On a GPU more rows than CTAs have tiles take matrices too large to be executed here.
    monkeypatch.setattr(_native_cuda, "_TILE_CTAS", 1)
    monkeypatch.setattr(_layer_norm_native, "_MAX_PARTIALS", 2)
    sizes = 19, 264  # three rows for some threads of a tile, two for the others; three warps a row
    out, _ = execute(op, sizes, STREAM_AND_BRANCH[4])
    assert_matches_reference(op, sizes, STREAM_AND_BRANCH[4], out)


@pytest.mark.parametrize("op", OPS)
def test_no_rows_are_no_launch(op: str):
    out, results = execute(op, (0, 64), STREAM_AND_BRANCH[0])
    assert not results
    assert_matches_reference(op, (0, 64), STREAM_AND_BRANCH[0], out)


@pytest.mark.parametrize("op", OPS)
def test_nan_in_a_row_stays_in_its_row(op: str):
    poisoned = 3  # of the rows; gathered ones are read by place in the stream

    def poison(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[poisoned] = float("nan")
        return tensor

    clean, _ = execute(op, (ROWS, 64), STREAM_AND_BRANCH[0])
    dirty, _ = execute(op, (ROWS, 64), STREAM_AND_BRANCH[0], poison)
    for name, tensor in dirty.items():
        if tensor.ndim == 2:
            bad = tensor.isnan().any(1)
            assert 1 <= bad.sum() <= 2  # the row itself, and the stream's row of that number
            assert torch.equal(tensor[~bad], clean[name][~bad])


@pytest.mark.parametrize("op", OPS)
def test_warps_touch_whole_sectors(op: str):
    types = STREAM_AND_BRANCH[0] if op in ("gelu", "swiglu") else STREAM_AND_BRANCH[4]
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
    _, results = execute(op, sizes, STREAM_AND_BRANCH[0])
    deletions = list(native_on_ptx.deletions(results))
    assert deletions
    for deletion in deletions:
        with pytest.raises(Fault):
            execute(op, sizes, STREAM_AND_BRANCH[0], edit=deletion)
