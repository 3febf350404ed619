"""Matrix products of a block and a head: what stands behind the choices of ops/_matmul.py.

Where rows of "bfloat16 in float32" are faster than those of "bfloat16 library", the rule must say
that the processor has no fast bfloat16. Weights are float32 and converted where a way needs it.
With `--full`, rows of libraries tell whether another one than torch's would be faster in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import CPU_ROW, measure
from benchmarks.libraries import LIBRARIES, product_by, why_no_library
from benchmarks.shapes import CPU_IMAGES, DROP_RATIO, FULL, WIDTHS, num_tokens
from dinov2_fast.ops import _matmul as matmul

# Backend -> type of the activations, and what `has_fast_bfloat16` is made to say.
CONTENDERS = {
    "float32": (torch.float32, False),
    "bfloat16 library": (torch.bfloat16, True),
    "bfloat16 in float32": (torch.bfloat16, False),
}


def layers(rows: int, width: int) -> dict[str, tuple[int, int, int]]:
    """(rows, inputs, outputs) of the products of a block."""
    return {
        "qkv": (rows, width, 3 * width),
        "fc1": (rows, width, 4 * width),
        "fc2": (rows, 4 * width, width),
    }


LAYERS = [
    *[pytest.param(s, id=name) for name, s in layers(num_tokens(1), WIDTHS["ViT-S"]).items()],
    # The hidden layer and the prototypes, for CLS and masked patches; an AVX2 processor takes 20 s
    # for one of the former in the library's bfloat16.
    pytest.param((394, 2048, 2048), id="head", marks=FULL),
    pytest.param((394, 256, 8192), id="prototypes", marks=FULL),
    *[
        pytest.param(s, id=f"{model} {name}", marks=FULL)
        for model, width in WIDTHS.items()
        for name, s in layers(num_tokens(CPU_IMAGES, DROP_RATIO), width).items()
    ],
]

pytestmark = CPU_ROW


def product(
    backend: str, mode: str, x: Tensor, gradient: Tensor, weight: Tensor
) -> Callable[[], Tensor]:
    """One of the three products of a linear layer."""
    if backend in LIBRARIES:
        factors = {
            "forward": (x, weight.t()),
            "input gradient": (gradient, weight),
            "weight gradient": (gradient.t(), x),
        }
        return product_by(backend, *factors[mode])
    if mode == "forward":
        return lambda: matmul.linear(x, weight, None)
    if mode == "input gradient":
        return lambda: matmul.input_gradient(gradient, weight)
    return lambda: matmul.weight_gradient(gradient, x, weight)


@pytest.mark.parametrize(  # in turn, row by row
    "backend", [*CONTENDERS, *(pytest.param(name, marks=FULL) for name in LIBRARIES)]
)
@pytest.mark.parametrize("mode", ["forward", "input gradient", "weight gradient"])
@pytest.mark.parametrize("shape", LAYERS)
def test_matmul(
    benchmark: Any,
    backend: str,
    shape: tuple[int, int, int],
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
):
    if reason := why_no_library(backend):
        pytest.skip(reason)
    rule = matmul.has_fast_bfloat16()
    dtype, fast = CONTENDERS.get(backend, (torch.float32, rule))
    monkeypatch.setattr(matmul, "has_fast_bfloat16", lambda: fast)
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    gradient = torch.randn(rows, outputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    measure(
        benchmark,
        product(backend, mode, x, gradient, weight),
        op="matmul",
        backend=backend,
        dtype=dtype,
        shape=shape,
        mode=mode,
        device="cpu",
        num_bytes=x.element_size() * (x.numel() + gradient.numel()) + 4 * weight.numel(),
        num_flops=2 * rows * inputs * outputs,
    )
    # Rows are compared across types: one group for all three.
    benchmark.group = f"matmul {mode} {shape}"
    benchmark.extra_info.update(has_fast_bfloat16=rule)
