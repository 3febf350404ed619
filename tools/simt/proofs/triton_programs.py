"""Programs nobody here wrote: Triton's PTX against NumPy.

Every program is a function of an architecture (80 or 90) and the options of a launch; it returns
the largest error relative to the largest value, and the counters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.simt.bulk import TensorMap
from tools.simt.launch import Result, launch
from tools.simt.memory import Output
from tools.simt.numbers import from_bf16, to_bf16


@dataclass
class Compiled:
    """A Triton kernel compiled without a GPU."""

    name: str
    ptx: str
    threads: int
    shared_bytes: int

    def run(self, grid: Any, args: list[Any], **options: Any) -> Result:
        """Execute it."""
        return launch(self.ptx, self.name, grid, self.threads, args, self.shared_bytes, **options)


@functools.cache
def compiled(
    name: str, arch: int, signature: str, constants: tuple[tuple[str, Any], ...], **options: Any
) -> Compiled:
    """Compile a kernel of programs/triton_kernels.py.

    Args:
        name: the kernel, without `_kernel`.
        arch: 80 or 90.
        signature: types of the run-time arguments in order, between spaces.
        constants: names and values of the constexpr arguments.
        options: num_warps, num_stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tests.tools.simt.programs import triton_kernels

    function = getattr(triton_kernels, f"{name}_kernel")
    fixed = dict(constants)
    free = [arg for arg in function.arg_names if arg not in fixed]
    types = dict(zip(free, signature.split(), strict=True))
    types |= dict.fromkeys(fixed, "constexpr")
    # Pointers are multiples of 16, as Triton finds them at run time.
    attrs = {
        (function.arg_names.index(arg),): [["tt.divisibility", 16]]
        for arg in free
        if types[arg].startswith("*")
    }
    source = ASTSource(function, types, fixed, attrs)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options or None)
    meta = made.metadata
    return Compiled(meta.name, made.asm["ptx"], 32 * meta.num_warps, meta.shared)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest error over the largest value; infinite where NaN."""
    error = np.abs(got.astype(np.float64) - expected).max()
    return float(error / np.abs(expected).max()) if np.isfinite(error) else np.inf


def brain(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random bf16 bits."""
    return to_bf16(rng.normal(size=shape).astype(np.float32))


def matmul(arch: int, kind: str = "bf16", stages: int = 3, **options: Any) -> tuple[float, Result]:
    """C = A B with ragged edges."""
    rng = np.random.default_rng(0)
    m, n, k = 150, 96, 144
    if kind == "bf16":
        a, b = brain(rng, m, k), brain(rng, k, n)
        expected = from_bf16(a).astype(float) @ from_bf16(b).astype(float)
    else:
        a, b = (rng.normal(size=s).astype(kind) for s in ((m, k), (k, n)))
        expected = a.astype(float) @ b.astype(float)
    kinds = {"bf16": "bf16", "float16": "fp16", "float32": "fp32"}[kind]
    blocks = (("BLOCK_M", 64), ("BLOCK_N", 64), ("BLOCK_K", 32))
    signature = f"*{kinds} *{kinds} *fp32 i32 i32 i32"
    kernel = compiled("matmul", arch, signature, blocks, num_warps=4, num_stages=stages)
    c = np.empty((m, n), np.float32)
    result = kernel.run((3, 2), [a, b, Output(c), m, n, k], **options)
    return relative_error(c, expected), result


def attention(
    arch: int, causal: bool = False, n: int = 150, **options: Any
) -> tuple[float, Result]:
    """Two heads of 64, a ragged length."""
    rng = np.random.default_rng(0)
    heads, dims = 2, 64
    q, k, v = (brain(rng, heads, n, dims) for _ in range(3))
    o = np.empty((heads, n, dims), np.uint16)
    constants = (("D", dims), ("BLOCK", 64), ("CAUSAL", causal))
    signature = "*bf16 *bf16 *bf16 *bf16 i32 fp32"
    kernel = compiled("attention", arch, signature, constants, num_warps=4, num_stages=2)
    result = kernel.run((-(-n // 64), heads), [q, k, v, Output(o), n, dims**-0.5], **options)
    scores = from_bf16(q).astype(float) @ from_bf16(k).astype(float).swapaxes(1, 2) * dims**-0.5
    if causal:
        scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ from_bf16(v).astype(float)
    return relative_error(from_bf16(o), expected), result


def layer_norm(arch: int, **options: Any) -> tuple[float, Result]:
    """Rows of 700 elements."""
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.normal(size=s).astype(np.float32) for s in ((5, 700), 700, 700))
    out = np.empty_like(x)
    signature = "*fp32 *fp32 *fp32 *fp32 i32 fp32"
    kernel = compiled("layer_norm", arch, signature, (("BLOCK", 1024),), num_warps=4)
    result = kernel.run(5, [x, weight, bias, Output(out), 700, 1e-6], **options)
    wide = x.astype(float)
    normal = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-6)
    return relative_error(out, normal * weight + bias), result


def softmax(arch: int, **options: Any) -> tuple[float, Result]:
    """Rows of 700 elements."""
    x = np.random.default_rng(0).normal(size=(5, 700)).astype(np.float32)
    out = np.empty_like(x)
    kernel = compiled("softmax", arch, "*fp32 *fp32 i32", (("BLOCK", 1024),), num_warps=4)
    result = kernel.run(5, [x, Output(out), 700], **options)
    weights = np.exp(x.astype(float))
    return relative_error(out, weights / weights.sum(1, keepdims=True)), result


def scan(arch: int, **options: Any) -> tuple[float, Result]:
    """Running sums of integers."""
    x = np.random.default_rng(0).integers(-9, 9, (3, 512), np.int32)
    out = np.empty_like(x)
    kernel = compiled("scan", arch, "*i32 *i32", (("BLOCK", 512),), num_warps=4)
    result = kernel.run(3, [x, Output(out)], **options)
    return relative_error(out, x.cumsum(1)), result


def sort(arch: int, **options: Any) -> tuple[float, Result]:
    """Bitonic sort of floats."""
    x = np.random.default_rng(0).normal(size=(2, 256)).astype(np.float32)
    out = np.empty_like(x)
    kernel = compiled("sort", arch, "*fp32 *fp32", (("BLOCK", 256),), num_warps=4)
    result = kernel.run(2, [x, Output(out)], **options)
    return relative_error(out, np.sort(x, axis=1)), result


def argmax(arch: int, **options: Any) -> tuple[float, Result]:
    """Index of the largest of 300."""
    x = np.random.default_rng(0).normal(size=(6, 300)).astype(np.float32)
    out = np.empty(6, np.int32)
    kernel = compiled("argmax", arch, "*fp32 *i32 i32", (("BLOCK", 512),), num_warps=4)
    result = kernel.run(6, [x, Output(out), 300], **options)
    return relative_error(out, x.argmax(1)), result


def atomics(arch: int, **options: Any) -> tuple[float, Result]:
    """Histogram, sums and last positions."""
    rng = np.random.default_rng(0)
    n, bins = 700, 37
    index, x = rng.integers(0, bins, n, np.int32), rng.integers(-9, 9, n).astype(np.float32)
    count, total, last = np.zeros(bins, np.int32), np.zeros(bins, np.float32), np.zeros(bins, int)
    last = last.astype(np.int32)
    signature = "*i32 *fp32 *i32 *fp32 *i32 i32"
    kernel = compiled("atomics", arch, signature, (("BLOCK", 256),), num_warps=4)
    result = kernel.run(3, [index, x, count, total, last, n], **options)
    right = [
        np.array_equal(count, np.bincount(index, minlength=bins)),
        np.array_equal(total, np.bincount(index, x, bins)),
        np.array_equal(last, [np.flatnonzero(index == b).max(initial=0) for b in range(bins)]),
    ]
    return (0.0 if all(right) else np.inf), result


def philox(arch: int, **options: Any) -> tuple[float, Result]:
    """Counter-based random numbers, bit for bit."""
    out, seed = np.empty(512, np.int32), 0x123456789
    kernel = compiled("philox", arch, "*i32 i64", (("BLOCK", 256),), num_warps=4)
    result = kernel.run(2, [Output(out), seed], **options)
    c = [np.arange(512, dtype=np.uint64), *(np.zeros(512, np.uint64) for _ in range(3))]
    low, keys = np.uint64(0xFFFFFFFF), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, third = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high = [x >> np.uint64(32) for x in (first, third)]
        c = [
            high[1] ^ c[1] ^ np.uint64(keys[0]),
            third & low,
            high[0] ^ c[3] ^ np.uint64(keys[1]),
            first & low,
        ]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    right = np.array_equal(out.view(np.uint32), c[0].astype(np.uint32))
    return (0.0 if right else np.inf), result


def tma_matmul(arch: int, **options: Any) -> tuple[float, Result]:
    """Tiles by TMA both ways; every edge is ragged."""
    rng = np.random.default_rng(0)
    m, n, k = 120, 56, 200
    a, b = brain(rng, m, k), brain(rng, k, n)
    c = np.empty((m, n), np.uint16)
    blocks = (("BLOCK_M", 64), ("BLOCK_N", 64), ("BLOCK_K", 64))
    signature = " ".join(["tensordesc<bf16[64,64]>"] * 3 + ["i32"])
    kernel = compiled("tma_matmul", arch, signature, blocks, num_warps=4, num_stages=3)
    args: list[Any] = []
    for array in (a, b, Output(c)):  # a map, then the shape and the strides
        args += [TensorMap(array, (64, 64), 128), 0, 0, 0, 0]
    result = kernel.run((2, 1), [*args, k], **options)
    expected = from_bf16(a).astype(float) @ from_bf16(b).astype(float)
    return relative_error(from_bf16(c), expected), result


Program = Callable[..., tuple[float, Result]]
# Name -> program and the largest relative error allowed: rounding to bf16, of tf32, of float32.
PROGRAMS: dict[str, tuple[Program, float]] = {
    "matmul": (matmul, 1e-6),
    "matmul of float16": (functools.partial(matmul, kind="float16", stages=2), 1e-6),
    "matmul in tf32": (functools.partial(matmul, kind="float32"), 2e-3),
    "attention": (attention, 1e-2),
    "causal attention": (functools.partial(attention, causal=True), 1e-2),
    "layer norm": (layer_norm, 1e-6),
    "softmax": (softmax, 1e-6),
    "scan": (scan, 0.0),
    "sort": (sort, 0.0),
    "argmax": (argmax, 0.0),
    "atomics": (atomics, 0.0),
    "philox": (philox, 0.0),
}
# Programs that need sm_90.
HOPPER_PROGRAMS: dict[str, tuple[Program, float]] = {
    **PROGRAMS,
    "matmul by TMA": (tma_matmul, 4e-3),
}
