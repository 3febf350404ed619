"""Expressions compiled by nvcc and by g++ must agree in every bit; NaN agrees with NaN."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.simt.compile import compile_cu
from tools.simt.launch import launch
from tools.simt.memory import Output

PROGRAMS = Path(__file__).parents[3] / "tests" / "tools" / "simt" / "programs"
SOURCE = PROGRAMS / "arithmetic.cu"
HOST_FLAGS = ("-x", "c++", "-std=c++17", "-O1", "-ffp-contract=off", "-frounding-math", "-w")
EDGES = [
    *(0, 1, 2, 31, 32, 33, 63, 64, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF),
    *(0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x00000001, 0x80000001),
    *(0x00800000, 0x007FFFFF, 0x7F7FFFFF, 0x3F000000, 0x4B000000, 0x4F000000, 0xCF000000),
    *(0x5F000000, 0x3C003C00, 0x7C00FC00, 0x7E000001, 0x04000401, 0x7BFF7BFF, 0x33FFFFFF),
]


@dataclass
class Outcome:
    """How many expressions agree, and the first input on which the others do not."""

    expressions: list[str]
    num_inputs: int
    wrong: list[str]


def inputs(count: int) -> np.ndarray:
    """Triples [3, count] of 64-bit values: edge cases, random bits, and numbers near each other."""
    rng = np.random.default_rng(1)
    values = rng.integers(0, 1 << 64, (3, count), np.uint64, endpoint=False)
    edges = np.array(EDGES, np.uint64)
    doubles = np.array(
        [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 5e-324, 1e308, 2.0**31, -(2.0**31), 0.5]
    ).view(np.uint64)
    for row in values:
        kind = rng.integers(0, 4, count)
        row[kind == 0] = rng.choice(edges, int((kind == 0).sum()))
        # Floats of moderate size in the lower half, doubles of moderate size as a whole.
        moderate = rng.normal(0, 4, count).astype(np.float32).view(np.uint32).astype(np.uint64)
        row[kind == 1] = (row & ~np.uint64(0xFFFFFFFF) | moderate)[kind == 1]
        row[kind == 2] = rng.normal(0, 1e3, count).view(np.uint64)[kind == 2]
        some = rng.random(count) < 0.05
        row[some] = rng.choice(doubles, int(some.sum()))
    near = rng.random(count) < 0.2  # sums that nearly cancel
    values[1, near] = (
        values[0, near] ^ np.uint64(0x80000000) ^ rng.integers(0, 4, near.sum(), np.uint64)
    )
    # Products in the middle between two floats, and a third operand that decides.
    chosen = [(0x45800800, 0x45800800, tiny) for tiny in (0, 1, 0x80000001, 0x33800000)]
    chosen += [(0x3F800001, 0x3FC00000, tiny) for tiny in (0, 1, 0x80000001, 0xB3000000)]
    # The smallest number by -1: the quotient that does not fit.
    chosen += [(1 << bits - 1, (1 << bits) - 1, 0) for bits in (32, 64)]
    values[:, : len(chosen)] = np.array(chosen, np.uint64).T
    return values


def from_host(values: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The expressions, and what g++ makes of them [expressions, count]."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "arithmetic"
        subprocess.run(["g++", *HOST_FLAGS, "-o", program, SOURCE], check=True)
        names = subprocess.run([program, "names"], capture_output=True, check=True, text=True)
        done = subprocess.run(program, input=values.tobytes(), capture_output=True, check=True)
    return names.stdout.splitlines(), np.frombuffer(done.stdout, np.uint64)


def from_interpreter(values: np.ndarray, num_expressions: int) -> np.ndarray:
    """What nvcc's PTX makes of the expressions [expressions, count]."""
    count = values.shape[1]
    out = np.zeros((num_expressions, count), np.uint64)
    ptx = compile_cu(SOURCE, "compute_80", flags=("-fmad=false",))
    args = [values, Output(out), count]
    launch(ptx, "arithmetic_kernel", -(-count // 256), 256, args, lanes=4096)
    return out


def floating(name: str) -> str:
    """The kind of float that an expression gives, by its text: f32, f64 or none."""
    if name.startswith(("__float2", "__double2int", "setp", "testp", "set_u32", "either")):
        return ""
    if any(sign in name for sign in (" < ", " == ", " != ", ">= ")) and "?" not in name:
        return ""
    if name.startswith(("float(", "__double2float", "set_f32", "of_half")):
        return "f32"
    letters = set("".join(c if c.isalpha() else " " for c in name).split())
    if letters & set("pqr") or name.startswith("double"):
        return "" if name.startswith("half_") else "f64"
    packed = name.startswith(("bf16x2", "f16x2", "half_", "tf32"))
    return "f32" if letters & set("fgh") and not packed else ""


def prove(count: int = 8192) -> Outcome:
    """Compare all expressions on `count` inputs."""
    values = inputs(count)
    names, host = from_host(values)
    host = host.reshape(len(names), count)
    ours = from_interpreter(values, len(names))
    wrong = []
    for name, expected, got in zip(names, host, ours, strict=True):
        kind = floating(name)
        same = expected == got
        if kind:
            as_float = np.uint32 if kind == "f32" else np.uint64
            floats = [
                x.astype(as_float).view(np.float32 if kind == "f32" else np.float64)
                for x in (expected, got)
            ]
            same |= np.isnan(floats[0]) & np.isnan(floats[1])
        if not same.all():
            at = int(np.flatnonzero(~same)[0])
            triple = " ".join(f"{int(v):#x}" for v in values[:, at])
            wrong.append(
                f"{name}: {int((~same).sum())} of {count}, first for {triple}: "
                f"expected {int(expected[at]):#x}, got {int(got[at]):#x}"
            )
    return Outcome(names, count, wrong)
