"""Triton compiles its kernels for GPUs that this machine need not have."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast import environment

WIDTH, PROTOTYPES = 768, 65536
NUM_KERNELS = {"koleo": 4}  # of an op; of any other 2
CUOBJDUMP = shutil.which("cuobjdump")
ALIGNED = [["tt.divisibility", 16]]
NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
}


def layer_norm(kernels: Any) -> None:
    x, y, rows = torch.empty(64, WIDTH), torch.empty(32, WIDTH).bfloat16(), torch.arange(32)
    weight, rstd = torch.empty(WIDTH), torch.empty(32)
    kernels.forward(x, weight, weight, 1e-6, rows, y, None, rstd)
    kernels.backward(x, y, y, None, rstd, weight, weight, None, rows, add=True)


def stochastic_depth(kernels: Any) -> None:
    x, y, rows = torch.empty(64, WIDTH), torch.empty(32, WIDTH).bfloat16(), torch.arange(32)
    kernels.scatter_(x, y, rows, torch.empty(32), torch.empty(WIDTH))
    kernels.gather(x, rows, torch.empty(32), None, None, y, want_sums=True)


def gelu(kernels: Any) -> None:
    x, a = torch.empty(32, WIDTH).bfloat16(), torch.empty(32, WIDTH).bfloat16()
    kernels.forward(x, a)
    kernels.backward(a, x, x, a, want_sums=True)


def swiglu(kernels: Any) -> None:
    x12, h = torch.empty(32, 2 * WIDTH).bfloat16(), torch.empty(32, WIDTH).bfloat16()
    kernels.forward(x12, h)
    kernels.backward(h, x12, x12, h, want_sums=True)


def sinkhorn(kernels: Any) -> None:
    logits, log_u, log_v = (
        torch.empty(32, PROTOTYPES).half(),
        torch.empty(PROTOTYPES),
        torch.empty(32),
    )
    kernels.columns(logits, log_v, 25.0, log_u, log_u)
    kernels.rows(logits, log_u, 25.0, log_v)


def cross_entropy(kernels: Any) -> None:
    student, teacher = torch.empty(32, PROTOTYPES).bfloat16(), torch.empty(16, PROTOTYPES).half()
    vectors = torch.empty(PROTOTYPES), torch.empty(16), torch.zeros(32, 2, dtype=torch.int64)
    arguments = (student, teacher, *vectors, 0.1, 0.04)
    loss, normalizer = torch.empty(32), torch.empty(32, dtype=torch.float64)
    kernels.forward(*arguments, loss, normalizer, loss)
    kernels.backward(loss, normalizer, loss, *arguments, student)


def koleo(kernels: Any) -> None:
    x, of_rows, nearest = torch.empty(64, WIDTH), torch.empty(64), torch.arange(64)
    kernels.forward(x, of_rows, x, of_rows, nearest, of_rows, 1e-8)
    kernels.backward(of_rows, x, of_rows, nearest, of_rows, x, 1e-8)


def compile_for(target: Any, function: Any, arguments: tuple[Any, ...], options: dict) -> Any:
    """Compile for the arguments of a launch, as Triton would on the spot."""
    compiler = importlib.import_module("triton.compiler")
    num_warps = {"num_warps": options.pop("num_warps")}
    values = dict(zip(function.arg_names, arguments, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(function.params):
        value = values[parameter.name]
        one = isinstance(value, int) and value == 1
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
    "launch", [layer_norm, stochastic_depth, gelu, swiglu, sinkhorn, cross_entropy, koleo]
)
def test_kernels_compile_without_spills(
    launch: Callable[[Any], None],
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    jit = pytest.importorskip("triton.runtime.jit")
    if environment.triton_interpreted():
        pytest.skip("Triton interprets")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    compiled: list[Any] = []

    def run(function: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(compile_for(target, function, arguments, options))

    monkeypatch.setattr(jit.JITFunction, "run", run)
    launch(importlib.import_module(f"dinov2_fast.kernels.{launch.__name__}"))
    assert len(compiled) == NUM_KERNELS.get(launch.__name__, 2)
    for kernel in compiled:
        sixteen_bytes = r"ld\.global(\.\w+)*\.v4\.b32|cp\.async\.cg\.shared\.global .*, 0x10"
        assert re.search(sixteen_bytes, kernel.asm["ptx"])
        if CUOBJDUMP:
            cubin = tmp_path / "kernel.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            said = subprocess.run(
                [CUOBJDUMP, "--dump-resource-usage", cubin],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            assert "LOCAL:0" in said
            assert int(re.findall(r"STACK:(\d+)", said)[-1]) <= 16
