from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest

from dinov2_fast import environment

KERNELS = ["forward", "backward_queries", "backward_keys", "backward_short"]
TILE = {"D": 64, "WIDE": 64, "BLOCK_Q": 64, "BLOCK_K": 64, "PRECISION": "ieee"}  # bfloat16's


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_without_spills(name: str, architecture: int, tmp_path: Path):
    triton = pytest.importorskip("triton")
    if environment.triton_interpreted():
        pytest.skip("TRITON_INTERPRET=1: nothing is compiled")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", architecture, 32)
    kernels = importlib.import_module("dinov2_fast.kernels.attention")
    kernel = getattr(kernels, f"{name}_kernel")

    constants = {(kernel.arg_names.index(key),): value for key, value in TILE.items()}
    types = {argument: type_of(argument) for argument in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if argument.endswith("_ptr") or re.fullmatch(r"stride_[^le].", argument)
    }
    source = compiler.ASTSource(kernel, types, constants, aligned)
    options = {"num_warps": 4, "num_stages": 2}
    compiled = triton.compile(source, target=target, options=options)

    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", said)[0])
    assert stack == 0, said
    assert registers <= 255
    products = "wgmma.mma_async" if architecture == 90 else "mma.sync"
    assert products in compiled.asm["ptx"]


def type_of(argument: str) -> str:
    """Triton's name of an argument's type, as a pack of bfloat16 has it."""
    if argument in TILE:
        return "constexpr"
    if argument.endswith("_ptr"):
        element = "fp32" if argument in {"lse_ptr", "delta_ptr"} else "bf16"
        return "*i32" if "offsets" in argument else f"*{element}"
    return "fp32" if argument.startswith("scale") else "i32"
