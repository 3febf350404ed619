"""Floating-point instructions: one rounding each, in every rounding mode.

float64 holds a product of two float32 exactly; sums are rounded to odd before the final rounding.
The approximate functions are computed as exactly as NumPy can (hardware: 1-2 ulp off).
Source: PTX ISA manual, sections 9.7.3-9.7.5.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from tools.simt.core import Batch, Mask, Run, binds
from tools.simt.numbers import (
    exact_sum,
    flush,
    from_bf16,
    round_to,
    to_odd,
    two_product,
    two_sum,
    unpack,
)
from tools.simt.program import Imm, Inst, Operand

MODES = ("rn", "rz", "rm", "rp")
TINY = 2.0**-125
Function = Callable[..., np.ndarray]


def mode_of(inst: Inst) -> str:
    """The rounding mode of an instruction."""
    return next((mod for mod in inst.mods if mod in MODES), "rn")


def narrow_source(batch: Batch, operand: Operand, kind: str) -> Callable[[], Any]:
    """A 16-bit float as float32, read when called."""
    if isinstance(operand, Imm) and operand.kind != "int":
        value = batch.source(operand, "f32")
        return lambda: value
    bits = batch.source(operand, "b16")
    if kind == "bf16":
        return lambda: from_bf16(np.asarray(bits))
    return lambda: np.ascontiguousarray(bits).view(np.float16).astype(np.float32)


def flushing(getter: Callable[[], Any], inst: Inst) -> Callable[[], Any]:
    """A source with its subnormals flushed if the instruction says so."""
    if "ftz" not in inst.mods or inst.type != "f32":
        return getter
    return lambda: flush(np.asarray(getter()))


def saturate(x: np.ndarray) -> np.ndarray:
    """Into [0, 1]; NaN becomes 0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def fma32(a: Any, b: Any, c: Any) -> np.ndarray:
    """float32 fma to nearest even."""
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    # The second rounding can only go wrong from the middle between two float32, or below them.
    middle = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    small = (np.abs(total) < TINY) & (total != 0)
    if (middle | small).any():
        total = exact_sum(product, np.asarray(c, np.float64), "rn")
    return total.astype(np.float32)


def fma64(a: Any, b: Any, c: Any) -> np.ndarray:
    """float64 fma to nearest even (Boldo and Melquiond, by rounding to odd)."""
    a, b, c = np.broadcast_arrays(np.float64(a), np.float64(b), np.float64(c))
    plain = a * b + c
    high, low = two_product(a, b)
    third, rest = two_sum(c, low)
    total, error = two_sum(high, third)
    tail, tail_error = two_sum(rest, error)
    result = total + to_odd(np.ascontiguousarray(tail), tail_error)
    result = np.where(np.isfinite(plain) & (plain != 0), result, plain)
    # Where errors underflow or splitting overflows: exact fractions.
    size = np.maximum(np.abs(a), np.maximum(np.abs(b), np.abs(a * b)))
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    hard = finite & (a != 0) & (b != 0) & ((np.abs(a * b) < 2.0**-900) | (size > 2.0**990))
    for lane in np.flatnonzero(hard & (np.abs(plain) < 2.0**1020)):
        value = Fraction(a[lane]) * Fraction(b[lane]) + Fraction(c[lane])
        result[lane] = float(value) if value else plain[lane]
    return np.where(np.isinf(c) & np.isfinite(a) & np.isfinite(b), c, result)


def extreme(op: str, propagates: bool) -> Function:
    """Min or max: NaN loses, or wins; -0 is below +0."""
    chosen = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[op][propagates]

    def function(a: Any, b: Any) -> np.ndarray:
        value = chosen(a, b)
        zeros = (a == 0) & (b == 0)
        if zeros.any():
            a, b = np.broadcast_arrays(a, b)
            negative = (
                np.signbit(a) | np.signbit(b) if op == "min" else (np.signbit(a) & np.signbit(b))
            )
            value = np.where(zeros, np.where(negative, -0.0, 0.0).astype(value.dtype), value)
        return value

    return function


def in_float64(op: str, mode: str) -> Function:
    """An arithmetic op on float64 copies of narrower floats, rounded to odd where inexact."""
    return {
        "add": lambda a, b: exact_sum(a, b, mode),
        "sub": lambda a, b: exact_sum(a, -b, mode),
        "mul": lambda a, b: a * b,
        "fma": lambda a, b, c: exact_sum(a * b, c, mode),
        "mad": lambda a, b, c: exact_sum(a * b, c, mode),
        "div": quotient_to_odd,
        "rcp": lambda a: quotient_to_odd(np.ones_like(a), a),
        "sqrt": root_to_odd,
    }[op]


def quotient_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 quotient of float32 values, to odd."""
    quotient = a / b
    product, error = two_product(quotient, b)
    left = (a - product) - error
    ok = np.isfinite(quotient) & (b != 0)
    return to_odd(quotient, np.where(ok, np.copysign(1.0, b) * left, 0.0))


def root_to_odd(a: np.ndarray) -> np.ndarray:
    """float64 square root of float32 values, to odd."""
    root = np.sqrt(a)
    square, error = two_product(root, root)
    return to_odd(root, np.where(np.isfinite(root), (a - square) - error, 0.0))


DIRECT: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
}
APPROXIMATE: dict[str, Function] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


def function_of(inst: Inst, kind: str) -> Function:
    """What an instruction computes on float32 or float64 arrays."""
    op, mode = inst.op, mode_of(inst)
    if op in ("min", "max"):
        return extreme(op, "NaN" in inst.mods)
    if op in APPROXIMATE:
        return APPROXIMATE[op]
    if kind == "f64":
        if mode != "rn":
            raise ValueError("float64 is computed to nearest even only")
        return fma64 if op in ("fma", "mad") else DIRECT[op]
    if mode == "rn" and kind == "f32":
        return fma32 if op in ("fma", "mad") else DIRECT[op]
    exact = in_float64(op, mode)

    def function(*values: Any) -> np.ndarray:
        return round_to(exact(*(np.asarray(v, np.float64) for v in values)), kind, mode)

    return function


def float_binder(inst: Inst, batch: Batch) -> Run:
    """The closure of an arithmetic instruction on floats."""
    kind = inst.type
    if inst.op in ("abs", "neg"):
        return sign_bits(inst, batch)
    if kind.endswith("x2"):
        return packed(inst, batch)
    if kind in ("f16", "bf16"):
        return narrow(inst, batch)
    if inst.op in ("min", "max") and kind == "f32" and len(inst.operands) == 4:
        raise ValueError("three-input min and max")
    d = batch.dest(inst.operands[0], kind)
    values = [batch.source(operand, kind) for operand in inst.operands[1:]]
    function = function_of(inst, kind)
    flushes, saturates = "ftz" in inst.mods and kind == "f32", "sat" in inst.mods
    if isinstance(function, np.ufunc) and not (flushes or saturates):
        return lambda m: function(*values, out=d, where=m)

    def run(m: Mask) -> None:
        inputs = [flush(np.asarray(v)) for v in values] if flushes else values
        result = np.asarray(function(*inputs), d.dtype)
        if flushes:
            result = flush(result)
        if saturates:
            result = saturate(result)
        np.copyto(d, result, where=m)

    return run


def sign_bits(inst: Inst, batch: Batch) -> Run:
    """Abs and neg, which only touch the sign bits."""
    kind = inst.type
    width = {"f64": 64, "f16": 16, "bf16": 16}.get(kind, 32)
    bits = f"b{width}"
    a = batch.source(inst.operands[1], bits)
    d = batch.dest(inst.operands[0], bits)
    sign = (1 << (width - 1)) | (0x8000 if kind.endswith("x2") else 0)
    if inst.op == "neg":
        flip = d.dtype.type(sign)
        change = lambda x: x ^ flip  # noqa: E731
    else:
        keep = d.dtype.type(((1 << width) - 1) ^ sign)
        change = lambda x: x & keep  # noqa: E731
    if "ftz" in inst.mods and kind == "f32":
        return lambda m: np.copyto(
            d, change(flush(np.asarray(a).view(np.float32)).view(np.uint32)), where=m
        )
    return lambda m: np.copyto(d, change(a), where=m)


def narrow_function(inst: Inst, kind: str) -> Function:
    """float32 values of a 16-bit type -> uint16 bits of the result."""
    if inst.op in ("min", "max") or inst.op in APPROXIMATE:
        plain = function_of(inst, "f32")
        wide = lambda *v: np.asarray(plain(*v), np.float64)  # noqa: E731
    else:
        exact = in_float64(inst.op, mode_of(inst))
        wide = lambda *v: exact(*(np.asarray(x, np.float64) for x in v))  # noqa: E731

    def function(*values: Any) -> np.ndarray:
        result = wide(*values)
        if "sat" in inst.mods:
            result = saturate(result)
        if "relu" in inst.mods:
            result = np.where(result > 0, result, np.where(np.isnan(result), result, 0.0))
        return round_to(result, kind, mode_of(inst)).view(np.uint16)

    return function


def narrow(inst: Inst, batch: Batch) -> Run:
    """Arithmetic on one f16 or bf16."""
    d = batch.dest(inst.operands[0], "b16")
    getters = [narrow_source(batch, operand, inst.type) for operand in inst.operands[1:]]
    function = narrow_function(inst, inst.type)
    return lambda m: np.copyto(d, function(*(get() for get in getters)), where=m)


def packed(inst: Inst, batch: Batch) -> Run:
    """Arithmetic on two f16 or bf16 in one register."""
    kind = inst.type[:-2]
    d = batch.dest(inst.operands[0], "b32")
    values = [batch.source(operand, "b32") for operand in inst.operands[1:]]
    function = narrow_function(inst, kind)

    def run(m: Mask) -> None:
        pairs = [unpack(np.broadcast_to(v, batch.num_lanes), kind) for v in values]
        low, high = (function(*half).astype(np.uint32) for half in zip(*pairs, strict=True))
        np.copyto(d, low | high << np.uint32(16), where=m)

    return run


@binds("fma", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def _float_only(inst: Inst, batch: Batch) -> Run:
    return float_binder(inst, batch)


@binds("copysign")
def _copysign(inst: Inst, batch: Batch) -> Run:
    d = batch.dest(inst.operands[0], inst.type)
    sign, size = (batch.source(operand, inst.type) for operand in inst.operands[1:])
    return lambda m: np.copysign(size, sign, out=d, where=m)


@binds("testp")
def _test(inst: Inst, batch: Batch) -> Run:
    p = batch.dest(inst.operands[0], "pred")
    a = batch.source(inst.operands[1], inst.type)
    smallest = np.finfo(a.dtype).tiny
    test = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= smallest),
        "subnormal": lambda x: (np.abs(x) < smallest) & (x != 0),
    }[inst.mods[0]]
    return lambda m: np.copyto(p, test(a), where=m)
