"""Seeds derived from what they are for, so that no random state has to be carried or saved."""

from __future__ import annotations

_MASK = (1 << 64) - 1
_INCREMENT = 0x9E3779B97F4A7C15

# Purposes keep the streams of one run apart; a value never changes meaning.
ORDER = 1
CROPS = 2
MASKS = 3
SUBSTITUTE = 4
DROPPED_SAMPLES = 5


def mix64(value: int) -> int:
    """A bijection on 64-bit integers in which every input bit changes half of the output bits.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
    generators, 2014).
    """
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derive_seed(*words: int) -> int:
    """A 64-bit seed that is a pure function of the words and of their order.

    Args:
        words: integers such as (seed, purpose, step, rank); taken modulo 2^64.
    """
    state = _INCREMENT
    for word in words:
        state = mix64((state ^ mix64(word)) + _INCREMENT)
    return state
