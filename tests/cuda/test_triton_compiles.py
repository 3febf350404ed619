"""Triton compiles its kernels for GPUs that this machine need not have."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast import environment
from tests.cuda.triton_calls import CALLS, Make, attention, optimizer

ALIGNED = [["tt.divisibility", 16]]
NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.bool: "i1",
}


def compile_for(target: Any, function: Any, arguments: tuple[Any, ...], options: dict) -> Any:
    """Compile for the arguments of a launch, as Triton would on the spot."""
    compiler = importlib.import_module("triton.compiler")
    num_warps = {"num_warps": options.pop("num_warps", 4)}
    values = dict(zip(function.arg_names, arguments, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(function.params):
        value = values[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = f"*{NAMES[value.dtype]}"
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = ALIGNED
    source = compiler.ASTSource(function, signature, constants, attributes)
    return compiler.compile(source, target=target, options=num_warps)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "launch",
    [call for call in CALLS if call is not attention],  # whose tiles have a test alone
)
def test_kernels_compile_without_spills(
    launch: Callable[[Make], None],
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    triton = pytest.importorskip("triton")
    if environment.triton_interpreted():
        pytest.skip("Triton interprets")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    compiled: list[Any] = []

    def run(function: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(compile_for(target, function, arguments, options))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    launch(torch.empty)
    assert len(compiled) == CALLS[launch]
    for kernel in compiled:
        sixteen_bytes = r"ld\.global(\.\w+)*\.v4\.b32|cp\.async\.cg\.shared\.global .*, 0x10"
        # The optimizer learns from memory where a tensor ends: its masks are of single elements.
        assert (launch is optimizer) != bool(re.search(sixteen_bytes, kernel.asm["ptx"]))
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        said = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "LOCAL:0" in said
        assert int(re.findall(r"STACK:(\d+)", said)[-1]) <= 16
