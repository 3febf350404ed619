"""The CUDA kernels of csrc/cuda/swiglu.cu, launched by their host code and executed."""

from __future__ import annotations

import pytest
import torch

from dinov2_fast.ops._native_cpu import dtype_name
from dinov2_fast.ops._native_cuda import run_cuda
from dinov2_fast.ops.swiglu import swiglu_reference
from tests.cuda import native_on_ptx
from tests.tolerance import assert_within_error_budget

SHAPES = [
    (3, 4096),  # ViT-g's hidden width, three rows of it
    (2, 77),  # no whole vectors: one element at a time
    (5, 8),  # one vector a row
]

pytestmark = pytest.mark.skipif(bool(native_on_ptx.why_not()), reason=native_on_ptx.why_not())


@pytest.mark.parametrize("schedule", ["lockstep", 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
def test_kernels_match_the_reference(
    rows: int, hidden: int, dtype: torch.dtype, schedule: str | int
):
    # Rows further apart than they are long: what lies between must be left alone.
    pad = 16 // dtype.itemsize
    x12 = torch.randn(rows, 2 * hidden + pad).to(dtype)
    dh = torch.randn(rows, hidden + pad).to(dtype)
    h = torch.full((rows, hidden + pad), float("nan"), dtype=dtype)
    dx12 = torch.full((rows, 2 * hidden + pad), float("nan"), dtype=dtype)
    sizes = {"rows": rows, "hidden": hidden, "dtype": dtype_name(x12)}
    sizes["x12_row_stride"] = x12.stride(0)
    with native_on_ptx.native_on_ptx(schedule=schedule) as results:
        run_cuda("swiglu_forward_cuda", x12=x12, h=h, h_row_stride=h.stride(0), **sizes)
        sizes |= {"dh_row_stride": dh.stride(0), "dx12_row_stride": dx12.stride(0)}
        sizes |= {"h": None, "h_row_stride": 0, "partials": None, "num_partials": 0}
        run_cuda("swiglu_backward_cuda", dh=dh, x12=x12, dx12=dx12, **sizes)
    assert len(results) == 2

    truth_x = x12[:, : 2 * hidden].double().requires_grad_()
    low_x = x12[:, : 2 * hidden].clone().requires_grad_()
    truth, low = swiglu_reference(truth_x), swiglu_reference(low_x)
    truth.backward(dh[:, :hidden].double())
    low.backward(dh[:, :hidden])
    for out, low_precision, exact, what in (
        (h[:, :hidden], low.detach(), truth.detach(), "h"),
        (dx12[:, : 2 * hidden], low_x.grad, truth_x.grad, "dx12"),
    ):
        assert_within_error_budget(out, low_precision=low_precision, truth=exact, name=what)
    assert h[:, hidden:].isnan().all()
    assert dx12[:, 2 * hidden :].isnan().all()
