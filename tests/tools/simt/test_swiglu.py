"""The CUDA kernels of csrc/cuda/swiglu.cu, executed."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from dinov2_fast.ops.swiglu import swiglu_reference
from tests.tolerance import assert_within_error_budget
from tools import simt
from tools.simt.compile import compile_cu, extension_folders

ROOT = Path(__file__).parents[3]
MANGLED = {torch.float32: "If", torch.float16: "I6__half", torch.bfloat16: "I13__nv_bfloat16"}
SHAPES = [
    (3, 4096),  # ViT-g's hidden width, three rows of it
    (2, 77),  # no whole vectors: one element at a time
    (5, 8),  # one vector a row
]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


class Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("dh", "x12", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "hidden")),
        *((f"{name}_row_stride", ctypes.c_int64) for name in ("dh", "x12", "out")),
    ]


@pytest.fixture(scope="module")
def ptx() -> str:
    pytest.importorskip("pybind11")
    source = ROOT / "csrc" / "cuda" / "swiglu.cu"
    return compile_cu(source, "compute_80", include=extension_folders(ROOT))


@pytest.mark.parametrize("schedule", ["lockstep", 1])
@pytest.mark.parametrize("dtype", MANGLED)
@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
def test_kernels_match_the_reference(
    ptx: str, rows: int, hidden: int, dtype: torch.dtype, schedule: str | int
):
    # Rows further apart than they are long: what lies between must be left alone.
    pad = 16 // dtype.itemsize
    x12 = torch.randn(rows, 2 * hidden + pad).to(dtype)
    dh = torch.randn(rows, hidden + pad).to(dtype)
    h = torch.full((rows, hidden + pad), float("nan"), dtype=dtype)
    dx12 = torch.full((rows, 2 * hidden + pad), float("nan"), dtype=dtype)
    vector = 1 if hidden % pad else pad
    block_x = min(256, 1 << (hidden // vector - 1).bit_length())
    block = (block_x, 256 // block_x)
    grid = (-(-hidden // vector // block[0]), -(-rows // block[1]))
    device = simt.Device()
    at = {"dh": device.pointer(dh, "dh"), "x12": device.pointer(x12, "x12")}
    strides = {"rows": rows, "hidden": hidden, "dh_row_stride": hidden + pad}
    strides["x12_row_stride"] = 2 * hidden + pad
    name = f"{MANGLED[dtype]}Li{vector}E"
    run = {"device": device, "schedule": schedule}
    forward = Params(**at, **strides, out=device.pointer(h, "h"), out_row_stride=hidden + pad)
    simt.launch(ptx, f"forward_kernel{name}", grid, block, [forward], **run)
    backward = Params(**at, **strides, out=device.pointer(dx12), out_row_stride=2 * hidden + pad)
    simt.launch(ptx, f"backward_kernel{name}", grid, block, [backward], **run)

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
