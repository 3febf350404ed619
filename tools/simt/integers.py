"""Integer, logic and move instructions, and comparisons.

Source: PTX ISA manual, section 9.7.1-9.7.9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tools.simt.core import Batch, Mask, Run, binds
from tools.simt.floats import float_binder
from tools.simt.numbers import FLOAT, SINT, UINT, dtype_of
from tools.simt.program import TYPE_BYTES, Inst, Reg, Symbol, Vec

UFUNCS = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def is_float(type_name: str) -> bool:
    """Whether a type is a float, packed ones included."""
    return type_name in FLOAT or "f16" in type_name


def sources(inst: Inst, batch: Batch, type_name: str, begin: int = 1) -> list[Any]:
    """The operands after the destination, as one type."""
    return [batch.source(operand, type_name) for operand in inst.operands[begin:]]


def put(d: np.ndarray, value: Any, m: Mask) -> None:
    """Write a result where the mask is set."""
    np.copyto(d, value, where=m, casting="unsafe")


@binds("add", "sub", "and", "or", "xor")
def _binary(inst: Inst, batch: Batch) -> Run:
    kind = inst.type
    if is_float(kind):
        return float_binder(inst, batch)
    if "cc" in inst.mods:
        return _carry(inst, batch)
    function = UFUNCS[inst.op]
    d = batch.dest(inst.operands[0], kind)
    a, b = sources(inst, batch, kind)
    if "sat" in inst.mods:

        def saturating(m: Mask) -> None:
            wide = function(np.asarray(a, np.int64), np.asarray(b, np.int64))
            put(d, np.clip(wide, -(2**31), 2**31 - 1), m)

        return saturating
    if kind == "pred":
        function = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[inst.op]
    return lambda m: function(a, b, out=d, where=m)


@binds("addc", "subc", "madc")
def _carry(inst: Inst, batch: Batch) -> Run:
    kind = "u" + inst.type[1:]
    width = TYPE_BYTES[kind] * 8
    d, flag = batch.dest(inst.operands[0], kind), batch.carry
    values = sources(inst, batch, kind)
    reads, writes = inst.op.endswith("c"), "cc" in inst.mods
    subtracts = inst.op.startswith("sub")
    if inst.op == "madc":
        multiply = high_product if "hi" in inst.mods else np.multiply

    def run(m: Mask) -> None:
        a, b = values[-2:]
        if inst.op == "madc":
            a, b = multiply(values[0], values[1]), values[2]
        kin = flag.astype(UINT[width // 8]) if reads else UINT[width // 8](0)
        first = a - b if subtracts else a + b
        total = first - kin if subtracts else first + kin
        out = (a < b) | (first < kin) if subtracts else (first < a) | (total < first)
        put(d, total, m)
        if writes:
            put(flag, out, m)

    return run


def high_product(a: Any, b: Any) -> Any:
    """The upper half of a product."""
    kind = np.asarray(a).dtype
    if kind.itemsize < 8:
        wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}")
        product = np.asarray(a, wide) * np.asarray(b, wide)
        return (product >> wide.type(8 * kind.itemsize)).astype(kind)
    ua, ub = np.asarray(a).astype(np.uint64), np.asarray(b).astype(np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = ua & low, ua >> half, ub & low, ub >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    high = a1 * b1 + (middle >> half) + ((a0 * b1 + (middle & low)) >> half)
    if kind.kind == "i":
        high = high - np.where(np.asarray(a) < 0, ub, np.uint64(0))
        high = high - np.where(np.asarray(b) < 0, ua, np.uint64(0))
    return high.astype(kind)


@binds("mul", "mad")
def _multiply(inst: Inst, batch: Batch) -> Run:
    kind = inst.type
    if is_float(kind):
        return float_binder(inst, batch)
    if "cc" in inst.mods:
        return _mad_cc(inst, batch)
    if "wide" in inst.mods:
        wide = f"{kind[0]}{16 * TYPE_BYTES[kind]}"
        d = batch.dest(inst.operands[0], wide)
        a, b = sources(inst, batch, kind)[:2]
        as_wide = dtype_of(wide)
        if inst.op == "mul":
            return lambda m: np.multiply(a, b, out=d, where=m, dtype=as_wide)
        c = batch.source(inst.operands[3], wide)
        return lambda m: np.add(np.multiply(a, b, dtype=as_wide), c, out=d, where=m)
    d = batch.dest(inst.operands[0], kind)
    a, b, *rest = sources(inst, batch, kind)
    product = high_product if "hi" in inst.mods else np.multiply
    if rest:
        return lambda m: np.add(product(a, b), rest[0], out=d, where=m)
    if product is np.multiply:
        return lambda m: np.multiply(a, b, out=d, where=m)
    return lambda m: put(d, high_product(a, b), m)


def _mad_cc(inst: Inst, batch: Batch) -> Run:
    kind = "u" + inst.type[1:]
    d = batch.dest(inst.operands[0], kind)
    a, b, c = sources(inst, batch, kind)
    multiply = high_product if "hi" in inst.mods else np.multiply

    def run(m: Mask) -> None:
        product = multiply(a, b)
        total = product + c
        put(batch.carry, total < product, m)
        put(d, total, m)

    return run


@binds("div", "rem")
def _divide(inst: Inst, batch: Batch) -> Run:
    kind = inst.type
    if is_float(kind):
        return float_binder(inst, batch)
    d = batch.dest(inst.operands[0], kind)
    a, b = sources(inst, batch, kind)
    if kind[0] == "u":
        function = np.floor_divide if inst.op == "div" else np.remainder
        return lambda m: function(a, b, out=d, where=m)

    def run(m: Mask) -> None:  # PTX truncates where NumPy rounds down
        unsigned = UINT[TYPE_BYTES[kind]]
        ua, ub = (np.abs(x).astype(unsigned) for x in (a, b))
        if inst.op == "div":
            quotient = (ua // ub).astype(d.dtype)
            put(d, np.where((a < 0) != (b < 0), -quotient, quotient), m)
        else:
            left = (ua % ub).astype(d.dtype)
            put(d, np.where(a < 0, -left, left), m)

    return run


@binds("min", "max")
def _extreme(inst: Inst, batch: Batch) -> Run:
    kind = inst.type
    if is_float(kind):
        return float_binder(inst, batch)
    d = batch.dest(inst.operands[0], kind)
    a, b = sources(inst, batch, kind)
    function = np.minimum if inst.op == "min" else np.maximum
    return lambda m: function(a, b, out=d, where=m)


@binds("abs", "neg")
def _sign(inst: Inst, batch: Batch) -> Run:
    kind = inst.type
    if is_float(kind):
        return float_binder(inst, batch)
    d, a = batch.dest(inst.operands[0], kind), batch.source(inst.operands[1], kind)
    function = np.abs if inst.op == "abs" else np.negative
    return lambda m: function(a, out=d, where=m)


@binds("not", "cnot")
def _not(inst: Inst, batch: Batch) -> Run:
    kind = inst.type
    d, a = batch.dest(inst.operands[0], kind), batch.source(inst.operands[1], kind)
    if inst.op == "cnot":
        return lambda m: put(d, a == 0, m)
    function = np.logical_not if kind == "pred" else np.invert
    return lambda m: function(a, out=d, where=m)


@binds("mov")
def _move(inst: Inst, batch: Batch) -> Run:
    to, source = inst.operands
    kind = inst.type
    if isinstance(to, Vec):
        part = f"b{8 * TYPE_BYTES[kind] // len(to.items)}"
        whole = batch.source(source, kind)
        pieces = [batch.dest(item, part) for item in to.items]
        size = TYPE_BYTES[part] * 8

        def split(m: Mask) -> None:
            for number, piece in enumerate(pieces):
                put(piece, whole >> whole.dtype.type(size * number), m)

        return split
    if isinstance(source, Vec):
        part = f"b{8 * TYPE_BYTES[kind] // len(source.items)}"
        parts = [batch.source(item, part) for item in source.items]
        d = batch.dest(to, kind)
        size = TYPE_BYTES[part] * 8

        def join(m: Mask) -> None:
            value = np.zeros(batch.num_lanes, d.dtype)
            for number, piece in enumerate(parts):
                value |= np.asarray(piece).astype(d.dtype) << d.dtype.type(size * number)
            put(d, value, m)

        return join
    if isinstance(source, Reg) and source.type != "pred":
        kind = f"b{8 * TYPE_BYTES[kind]}"  # bits, so that NaN stays as it is
    d = batch.dest(to, kind)
    a = batch.source(source, kind)
    if isinstance(source, Symbol) and source.name == "%ctaid":
        raise ValueError("mov of a whole vector register")
    return lambda m: np.copyto(d, a, where=m)


@binds("selp")
def _select(inst: Inst, batch: Batch) -> Run:
    kind = f"b{8 * TYPE_BYTES[inst.type]}" if inst.type != "pred" else "pred"
    d = batch.dest(inst.operands[0], kind)
    if is_float(inst.type):  # literals are of the float's type
        a, b = (batch.source(o, inst.type) for o in inst.operands[1:3])
        d = d.view(np.asarray(a).dtype)
    else:
        a, b = (batch.source(o, kind) for o in inst.operands[1:3])
    p = batch.source(inst.operands[3], "pred")
    return lambda m: np.copyto(d, np.where(p, a, b), where=m)


@binds("slct")
def _select_by_sign(inst: Inst, batch: Batch) -> Run:
    kind = inst.types[0]
    d = batch.dest(inst.operands[0], kind)
    a, b = (batch.source(o, kind) for o in inst.operands[1:3])
    c = batch.source(inst.operands[3], inst.types[1])
    return lambda m: put(d, np.where(c >= 0, a, b), m)


ORDERED: dict[str, Callable[[Any, Any], Any]] = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal},
    **{"hi": np.greater, "hs": np.greater_equal},
}


def comparison(name: str, floats: bool) -> Callable[[Any, Any], Any]:
    """The function of a comparison; the ones with u hold for NaN too."""

    def nan(a: Any, b: Any) -> Any:
        return np.isnan(a) | np.isnan(b)

    if name == "num":
        return lambda a, b: ~nan(a, b)
    if name == "nan":
        return nan
    if name == "ne" and floats:
        return lambda a, b: (a != b) & ~nan(a, b)
    if name == "neu":
        return np.not_equal
    if name.endswith("u") and name != "u":
        ordered = ORDERED[name[:-1]]
        return lambda a, b: ordered(a, b) | nan(a, b)
    return ORDERED[name]


@binds("setp", "set")
def _compare(inst: Inst, batch: Batch) -> Run:
    from tools.simt.floats import flushing, narrow_source

    kind = inst.type
    mods = [mod for mod in inst.mods if mod != "ftz"]
    join = mods[1] if mods[1] in ("and", "or", "xor") else None
    compare = comparison(mods[0], is_float(kind))
    if kind in ("f16", "bf16"):
        a, b = (narrow_source(batch, o, kind) for o in inst.operands[1:3])
    else:
        first, second = (batch.source(o, kind) for o in inst.operands[1:3])
        a, b = (flushing(lambda x=x: x, inst) for x in (first, second))
    other = batch.predicate(inst.operands[3]) if join else None
    function = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(join or "")
    if inst.op == "set":
        result = inst.types[0]
        d = batch.dest(inst.operands[0], result)
        yes = d.dtype.type(1) if result == "f32" else ~UINT[TYPE_BYTES[result]](0)
        yes = np.array(yes).view(d.dtype)[()] if result != "f32" else yes

        def run_set(m: Mask) -> None:
            value = compare(a(), b())
            put(d, np.where(function(value, other()) if function else value, yes, 0), m)

        return run_set
    to = inst.operands[0]
    first_to, second_to = (to.first, to.second) if hasattr(to, "first") else (to, None)
    p, q = batch.dest(first_to, "pred"), second_to and batch.dest(second_to, "pred")
    if function is None and q is None and not is_float(kind):
        direct = ORDERED[mods[0]]
        return lambda m: direct(first, second, out=p, where=m)

    def run(m: Mask) -> None:
        value = compare(a(), b())
        left = np.logical_not(value)
        if function:
            right = other()
            value, left = function(value, right), function(left, right)
        np.copyto(p, value, where=m)
        if q is not None:
            np.copyto(q, left, where=m)

    return run


@binds("sad", "dp4a")
def _rare(inst: Inst, batch: Batch) -> Run:
    if inst.op == "sad":
        d = batch.dest(inst.operands[0], inst.type)
        a, b, c = sources(inst, batch, inst.type)
        return lambda m: put(d, np.maximum(a, b) - np.minimum(a, b) + c, m)
    left, right = inst.types[0], inst.types[1]
    d = batch.dest(inst.operands[0], "s32" if "s" in left + right else "u32")
    a, b = (batch.source(o, "b32") for o in inst.operands[1:3])
    c = batch.source(inst.operands[3], "b32")

    def run(m: Mask) -> None:
        total = np.broadcast_to(c, batch.num_lanes).astype(np.uint32)
        for place in range(4):
            one, two = (
                np.asarray(x >> np.uint32(8 * place))
                .astype(np.uint8)
                .astype(SINT[1] if kind[0] == "s" else UINT[1])
                .astype(np.int64)
                for x, kind in ((a, left), (b, right))
            )
            total = total + (one * two).astype(np.uint32)
        put(d.view(np.uint32), total, m)

    return run
