"""The test programs on a real GPU: it must agree with what the interpreter computed."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.tools.simt import test_instructions
from tests.tools.simt.cuda_driver import launch_on_gpu
from tools import simt
from tools.simt.launch import launch as interpreted
from tools.simt.launch import three
from tools.simt.memory import Output
from tools.simt.parse import parse
from tools.simt.proofs import own_programs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
]
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)


def on_both(tolerance: float) -> Callable[..., Any]:
    """A launch that runs on the GPU and in the interpreter, and compares every array."""

    def launch(
        ptx: str,
        kernel: str,
        grid: Any,
        block: Any,
        args: Any,
        shared_bytes: int = 0,
        **options: Any,
    ) -> Any:
        mine = [copy.deepcopy(arg) for arg in args]
        entry = parse(ptx).kernel(kernel).name
        # Static shared memory is the driver's business; dynamic comes with the launch.
        launch_on_gpu(ptx, entry, three(grid), three(block), mine, shared_bytes)
        result = interpreted(ptx, kernel, grid, block, args, shared_bytes, **options)
        for theirs, ours in zip(mine, args, strict=True):
            a, b = (x.array if isinstance(x, Output) else x for x in (theirs, ours))
            if isinstance(a, np.ndarray):
                np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
        return result

    return launch


@pytest.mark.parametrize("name", ["softmax", "exchange", "gemm"])
def test_own_programs(name: str, monkeypatch: pytest.MonkeyPatch):
    program = next(p for p in own_programs.OWN if p.name == name)
    monkeypatch.setattr(own_programs, "launch", on_both(1e-5))
    error, _ = program.run(program.ptx())
    assert error <= 2 * program.tolerance


def test_arithmetic_that_is_exact():
    # Not the host's intrinsics: nvcc's own code on the GPU. NaN may differ in its payload.
    from tools.simt.proofs import arithmetic

    values = arithmetic.inputs(2048)
    names, host = arithmetic.from_host(values)
    host = host.reshape(len(names), -1)
    ptx = simt.compile_cu(arithmetic.SOURCE, "compute_80", flags=("-fmad=false",))
    out = np.zeros_like(host)
    launch_on_gpu(ptx, "arithmetic_kernel", (8,), (256,), [values, out, 2048])
    for name, expected, got in zip(names, host, out, strict=True):
        if not arithmetic.floating(name):
            assert np.array_equal(expected, got), name


@needs_hopper
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize(("transpose_a", "transpose_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_wgmma_layouts(
    swizzle: int, transpose_a: int, transpose_b: int, monkeypatch: pytest.MonkeyPatch
):
    def launch(ptx: str, kernel: str, grid: Any, block: Any, args: Any, shared: int) -> Any:
        wide = [np.uint64(a) if i in (2, 3) else a for i, a in enumerate(args)]
        return on_both(1e-5)(ptx, kernel, grid, block, wide, shared)

    monkeypatch.setattr(test_instructions.simt, "launch", launch)
    test_instructions.test_wgmma_reads_every_layout(swizzle, transpose_a, transpose_b)


@needs_hopper
@pytest.mark.parametrize(
    "test",
    [
        "barriers_reduce",
        "bulk_copies_without_a_tensor_map",
        "warp_collectives",
        "matrices_are_transposed",
        "table_jumps_and_own_arrays",
    ],
)
def test_instructions_of_hopper(test: str, monkeypatch: pytest.MonkeyPatch):
    ptx = simt.compile_cu(test_instructions.PROGRAMS / "instructions.cu", "compute_90a")
    plain = on_both(0.0)
    monkeypatch.setattr(test_instructions.simt, "launch", plain)
    function = getattr(test_instructions, f"test_{test}")
    schedule = ["lockstep"] if "schedule" in function.__code__.co_varnames[:2] else []
    function(ptx, *schedule)
