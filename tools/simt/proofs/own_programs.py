"""Small kernels of ours that are right, and how to run them: each returns its relative error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.simt.bulk import TensorMap
from tools.simt.compile import compile_cu
from tools.simt.launch import Result, launch
from tools.simt.memory import Output
from tools.simt.numbers import from_bf16
from tools.simt.proofs.arithmetic import PROGRAMS as FOLDER
from tools.simt.proofs.triton_programs import brain, relative_error

Run = Callable[..., tuple[float, Result]]


@dataclass(frozen=True)
class Program:
    """A kernel of tests/tools/simt/programs, and a run of it given PTX and launch options."""

    name: str
    file: str
    arch: str
    run: Run
    tolerance: float

    def ptx(self, *defines: str) -> str:
        """Its PTX; `defines` plant faults."""
        flags = [f"-D{define}" for define in defines]
        return compile_cu(FOLDER / self.file, self.arch, flags=flags)


def softmax(ptx: str, **options: Any) -> tuple[float, Result]:
    """Three rows of 300."""
    x = np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)
    out = np.empty_like(x)
    result = launch(ptx, "softmax_kernel", 3, 128, [x, Output(out), 300], **options)
    weights = np.exp(x.astype(float))
    return relative_error(out, weights / weights.sum(1, keepdims=True)), result


def exchange(ptx: str, **options: Any) -> tuple[float, Result]:
    """Three CTAs of two warps."""
    x = np.random.default_rng(0).integers(0, 99, 192, np.int32)
    flipped, sums, total = np.empty(192, np.int32), np.empty(3, np.int32), np.empty(1, np.int32)
    outputs = [Output(array) for array in (flipped, sums, total)]
    counter = np.zeros(1, np.uint32)
    result = launch(ptx, "exchange_kernel", 3, 64, [x, *outputs, counter], **options)
    right = np.array_equal(flipped.reshape(-1, 32), x.reshape(-1, 32)[:, ::-1])
    right = right and sums.tolist() == x.reshape(3, 64).sum(1).tolist() and total[0] == x.sum()
    return (0.0 if right else np.inf), result


def gemm(ptx: str, **options: Any) -> tuple[float, Result]:
    """Two CTAs, five steps along K."""
    rng = np.random.default_rng(0)
    m, n, k = 128, 64, 160
    a, b = brain(rng, m, k), brain(rng, k, n)
    c = np.empty((m, n), np.float32)
    result = launch(ptx, "gemm_kernel", (m // 64, n // 64), 128, [a, b, Output(c), n, k], **options)
    return relative_error(c, from_bf16(a).astype(float) @ from_bf16(b).astype(float)), result


def hopper_gemm(ptx: str, **options: Any) -> tuple[float, Result]:
    """Two CTAs, five steps along K through three stages; an edge of zeros along N."""
    rng = np.random.default_rng(0)
    m, n, k = 256, 56, 320
    a, b = brain(rng, m, k), brain(rng, k, n)
    c = np.empty((m, n), np.uint16)
    maps = [
        TensorMap(a, (64, 64), 128),
        TensorMap(b, (64, 64), 128),
        TensorMap(Output(c), (64, 64)),
    ]
    shared_bytes = 3 * (128 + 64) * 64 * 2 + 128 * 64 * 2
    result = launch(ptx, "hopper_gemm_kernel", (2, 1), 384, [*maps, k], shared_bytes, **options)
    expected = from_bf16(a).astype(float) @ from_bf16(b).astype(float)
    return relative_error(from_bf16(c), expected), result


def handover(ptx: str, **options: Any) -> tuple[float, Result]:
    """Two CTAs of two warps."""
    x = np.random.default_rng(0).normal(size=(128, 4)).astype(np.float32)
    out = np.empty_like(x)
    result = launch(ptx, "handover_kernel", 2, 64, [x, Output(out)], **options)
    return relative_error(out, x), result


OWN: Sequence[Program] = (
    Program("softmax", "softmax.cu", "compute_80", softmax, 1e-6),
    Program("exchange", "exchange.cu", "compute_80", exchange, 0.0),
    Program("handover", "handover.cu", "compute_80", handover, 0.0),
    Program("gemm", "gemm.cu", "compute_80", gemm, 1e-6),
    Program("hopper gemm", "hopper_gemm.cu", "compute_90a", hopper_gemm, 4e-3),
)
