"""cvt: every pair of types, every rounding, saturation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tools.simt.core import Batch, Mask, Run, binds
from tools.simt.floats import MODES, narrow_source, saturate
from tools.simt.numbers import exact_sum, flush, round_to, to_bf16
from tools.simt.program import Inst

TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
FLOATS = ("f16", "bf16", "tf32", "f32", "f64")


@binds("cvt")
def _convert(inst: Inst, batch: Batch) -> Run:
    to, source = inst.types[0], inst.types[1]
    if len(inst.mods) and any(mod in ("pack", "satfinite") for mod in inst.mods):
        raise ValueError("cvt to a packed integer or an 8-bit float")
    if to.endswith("x2"):
        return _pack(inst, batch, to[:-2])
    if to in FLOATS:
        return _to_float(inst, batch, to, source)
    if source in FLOATS:
        return _float_to_integer(inst, batch, to, source)
    d, a = batch.dest(inst.operands[0], to), batch.source(inst.operands[1], source)
    bounds = np.iinfo(f"{'i' if to[0] == 's' else 'u'}{int(to[1:]) // 8}")
    own = np.dtype(bounds.dtype)

    def run(m: Mask) -> None:
        value = np.asarray(a)
        if "sat" in inst.mods:
            limits = np.iinfo(value.dtype)
            value = np.clip(value, max(bounds.min, limits.min), min(bounds.max, limits.max))
        np.copyto(d, value.astype(own), where=m, casting="unsafe")

    return run


def _pack(inst: Inst, batch: Batch, kind: str) -> Run:
    d = batch.dest(inst.operands[0], "b32")
    high, low = (batch.source(operand, "f32") for operand in inst.operands[1:3])
    mode = next((mod for mod in inst.mods if mod in MODES), "rn")

    def bits(x: Any) -> np.ndarray:
        x = np.broadcast_to(x, batch.num_lanes)
        if "relu" in inst.mods:
            x = np.where(x > 0, x, np.where(np.isnan(x), x, np.float32(0)))
        if kind == "bf16" and mode == "rn":
            return to_bf16(x).astype(np.uint32)
        return round_to(x.astype(np.float64), kind, mode).view(np.uint16).astype(np.uint32)

    return lambda m: np.copyto(d, bits(high) << np.uint32(16) | bits(low), where=m)


def _float_source(inst: Inst, batch: Batch, kind: str) -> Callable[[], Any]:
    if kind in ("f16", "bf16"):
        return narrow_source(batch, inst.operands[1], kind)
    a = batch.source(inst.operands[1], kind)
    if "ftz" in inst.mods and kind == "f32":
        return lambda: flush(np.asarray(a))
    return lambda: np.asarray(a)


def _to_float(inst: Inst, batch: Batch, to: str, source: str) -> Run:
    size = {"f64": 64, "f32": 32, "tf32": 32}.get(to, 16)
    d = batch.dest(inst.operands[0], to if size >= 32 and to != "tf32" else f"b{size}")
    mode = next((mod for mod in inst.mods if mod in MODES or mod == "rna"), "rn")
    whole = next((TO_INTEGER[mod] for mod in inst.mods if mod in TO_INTEGER), None)
    if source in FLOATS:
        get = _float_source(inst, batch, source)
    else:
        integers = batch.source(inst.operands[1], source)
        get = lambda: _exact(np.asarray(integers), mode)  # noqa: E731

    def run(m: Mask) -> None:
        value = get()
        if whole:
            value = whole(value)
        value = np.asarray(value, np.float64)
        if to != "f64":
            value = round_to(np.ascontiguousarray(value), to, mode)
        elif source not in FLOATS:  # exact sums are to odd; the last rounding is not theirs
            value = integers.astype(np.float64)
        if "ftz" in inst.mods and to == "f32":
            value = flush(value)
        if "relu" in inst.mods or ("sat" in inst.mods and to == "bf16"):
            raise ValueError("cvt with .relu or .sat to one narrow float")
        if "sat" in inst.mods:
            value = saturate(value)
        np.copyto(d, value.view(d.dtype) if value.itemsize == d.itemsize else value, where=m)

    return run


def _exact(integers: np.ndarray, mode: str) -> np.ndarray:
    """Integers as float64, to odd where they do not fit."""
    if integers.dtype.itemsize < 8:
        return integers.astype(np.float64)
    low = integers & integers.dtype.type(0xFFFFFFFF)
    return exact_sum((integers - low).astype(np.float64), low.astype(np.float64), mode)


def _float_to_integer(inst: Inst, batch: Batch, to: str, source: str) -> Run:
    d = batch.dest(inst.operands[0], to)
    get = _float_source(inst, batch, source)
    bounds = np.iinfo(f"{'i' if to[0] == 's' else 'u'}{int(to[1:]) // 8}")
    own = np.dtype(bounds.dtype)
    whole = next((TO_INTEGER[mod] for mod in inst.mods if mod in TO_INTEGER), np.trunc)
    low, above = float(bounds.min), float(bounds.max) + (0.0 if bounds.bits == 64 else 1.0)

    def run(m: Mask) -> None:
        value = whole(np.asarray(get(), np.float64))
        inside = (value >= low) & (value < above)
        result = np.where(inside, value, 0).astype(own)
        result = np.where(value >= above, own.type(bounds.max), result)
        result = np.where(value < low, own.type(bounds.min), result)
        np.copyto(d, result, where=m, casting="unsafe")

    return run
