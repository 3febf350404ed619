from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinov2_fast.data.seeding import derive_seed, mix64

WORDS = st.integers(0, 2**64 - 1)


def undo_xor_shift(value: int, shift: int) -> int:
    result = value
    for _ in range(64 // shift):
        result = value ^ (result >> shift)
    return result


@given(WORDS)
def test_mix64_can_be_undone(value):
    mask = 2**64
    state = undo_xor_shift(mix64(value), 31)
    state = undo_xor_shift(state * pow(0x94D049BB133111EB, -1, mask) % mask, 27)
    state = undo_xor_shift(state * pow(0xBF58476D1CE4E5B9, -1, mask) % mask, 30)
    assert state == value


@given(WORDS, st.integers(0, 63))
def test_one_bit_changes_many(value, bit):
    changed = (mix64(value) ^ mix64(value ^ (1 << bit))).bit_count()
    assert 8 <= changed <= 56  # 32 +- 6 standard deviations of 64 fair coins


def test_streams_of_neighbouring_seeds_purposes_and_steps_do_not_meet():
    words = list(product(range(20), range(6), range(50), range(3)))
    seeds = {derive_seed(*word) for word in words}
    seeds |= {derive_seed(*word[:2]) for word in words}
    assert len(seeds) == len(words) + 20 * 6


@pytest.mark.parametrize("words", [(1, 2), (2, 1), (0,), (), (-1,), (2**70 + 1,)])
def test_seeds_are_64_bit_and_depend_on_the_order(words):
    assert 0 <= derive_seed(*words) < 2**64
    assert (derive_seed(1, 2) == derive_seed(2, 1)) is False


def test_values_never_change():
    # A changed value would change the data of every run that is resumed.
    assert derive_seed(0, 1, 2) == 0x6D5BAECB01B11A2D
    assert mix64(1) == 0x5692161D100B05E5
