"""PTX types as NumPy types, and roundings that NumPy lacks."""

from __future__ import annotations

import numpy as np

from tools.simt.program import TYPE_BYTES

UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SINT = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOAT = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
NARROW = {"f16": 2, "bf16": 2}  # computed as float32, then rounded


def dtype_of(type_name: str) -> np.dtype:
    """The NumPy type that holds a PTX type; bf16 and packed types as unsigned integers."""
    if type_name == "pred":
        return np.dtype(bool)
    if type_name in FLOAT:
        return np.dtype(FLOAT[type_name])
    size = TYPE_BYTES[type_name]
    return np.dtype(SINT[size] if type_name[0] == "s" else UINT[size])


def to_odd(high: np.ndarray, error: np.ndarray) -> np.ndarray:
    """float64 `high + error` rounded to odd, so that a second rounding is right in any mode."""
    inexact = (error != 0) & np.isfinite(high)
    if not inexact.any():
        return high
    bits = high.view(np.int64)
    truncated = np.where((error > 0) == (high > 0), bits, bits - 1)
    zero = high == 0  # cannot be inexact
    return np.where(inexact & ~zero, truncated | 1, bits).view(np.float64)


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 a + b and its rounding error."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 a * b and its rounding error (Dekker, by splitting)."""
    product = a * b

    def split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        high = (x.view(np.int64) & ~np.int64((1 << 27) - 1)).view(np.float64)
        return high, x - high

    a_high, a_low = split(np.ascontiguousarray(a))
    b_high, b_low = split(np.ascontiguousarray(b))
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, np.where(np.isfinite(product), error, 0.0)


def exact_sum(a: np.ndarray, b: np.ndarray, mode: str) -> np.ndarray:
    """float64 a + b to odd; zero has the sign that the mode gives it."""
    total, error = two_sum(a, b)
    total = to_odd(total, error)
    if mode == "rm":
        negative = (total == 0) & (np.signbit(a) | np.signbit(b))
        total = np.where(negative, -0.0, total)
    return total


def round_to(x: np.ndarray, type_name: str, mode: str = "rn") -> np.ndarray:
    """float64 (to odd where inexact) rounded to a type; bf16 comes back as bits, tf32 as float32.

    Modes: rn nearest even, rna nearest away, rz to zero, rm down, rp up.
    """
    if type_name in ("bf16", "tf32"):
        wide = round_to(x, "f32", "rz")
        inexact = (wide.astype(np.float64) != x) & np.isfinite(x)
        bits = (wide.view(np.uint32) | inexact).astype(np.uint32)
        return round_bits(bits, 16 if type_name == "bf16" else 13, mode, type_name == "bf16")
    near = x.astype(FLOAT[type_name])
    if type_name == "f16":
        near = np.where(np.isnan(x), np.uint16(0x7FFF).view(np.float16), near)
    if mode == "rn":
        return near
    back = near.astype(np.float64)
    infinity = near.dtype.type(np.inf)
    if mode == "rz":
        toward = np.where(np.abs(back) > np.abs(x), near.dtype.type(0), near)
    elif mode == "rm":
        toward = np.where(back > x, -infinity, near)
    else:
        toward = np.where(back < x, infinity, near)
    return np.copysign(np.nextafter(near, toward.astype(near.dtype)), near)


def round_bits(bits: np.ndarray, drop: int, mode: str, narrow: bool) -> np.ndarray:
    """float32 bits without their `drop` lowest, as uint16 if narrow and else as float32."""
    half, last = np.uint32(1 << (drop - 1)), np.uint32(drop)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    nan = magnitude > 0x7F800000
    negative = bits >> np.uint32(31) == 1
    if mode == "rn":
        add = (half - np.uint32(1)) + ((bits >> last) & np.uint32(1))
    elif mode == "rna":
        add = half
    else:
        away = {"rz": np.False_, "rm": negative, "rp": ~negative}[mode]
        add = np.where(away, np.uint32((1 << drop) - 1), np.uint32(0))
    finite = magnitude < 0x7F800000
    rounded = np.where(finite, bits + add, bits) >> last
    if narrow:
        return np.where(nan, 0x7FFF, rounded).astype(np.uint16)
    return np.where(nan, np.uint32(0x7FFFFFFF), rounded << last).astype(np.uint32).view(np.float32)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bf16 bits -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> bf16 bits, to nearest even."""
    return round_bits(np.ascontiguousarray(x, np.float32).view(np.uint32), 16, "rn", True)


def unpack(pair: np.ndarray, type_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Both halves of a packed register as float32, the lower first."""
    if type_name.startswith("bf16"):
        low, high = pair << np.uint32(16), pair & np.uint32(0xFFFF0000)
        return low.view(np.float32), high.view(np.float32)
    halves = np.ascontiguousarray(pair).view(np.float16)
    return halves[..., 0::2].astype(np.float32), halves[..., 1::2].astype(np.float32)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 as zeros of their sign."""
    tiny = np.abs(x) < np.float32(2.0**-126)
    return np.where(tiny, np.copysign(np.float32(0), x), x) if tiny.any() else x
