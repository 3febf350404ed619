from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2_fast.data.sampler import Permutation, batch_positions, sample_index


@pytest.mark.parametrize("size", [*range(1, 131), 997, 1024, 10_007])
def test_every_item_comes_exactly_once(size):
    permutation = Permutation(size, key=size * 7919)
    assert sorted(map(permutation, range(size))) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_every_size_and_key_is_a_bijection(size, key):
    permutation = Permutation(size, key)
    assert len(set(map(permutation, range(size)))) == size


@pytest.mark.parametrize("size", [2**40, 2**40 - 87, 10**12])
def test_huge_data_needs_no_memory_and_repeats_nothing(size):
    permutation = Permutation(size, key=3)
    positions = chain(range(5000), range(size // 2, size // 2 + 5000), range(size - 5000, size))
    items = [permutation(position) for position in positions]
    assert len(set(items)) == 15_000
    assert min(items) >= 0
    assert max(items) < size
    assert abs(sum(items) / len(items) / size - 0.5) < 0.015  # 6 standard errors of a uniform mean


def test_each_order_of_few_items_is_equally_likely():
    # 3000 draws of 24 orders, 125 of each expected; 6 standard deviations are 66.
    orders = Counter(tuple(map(Permutation(4, key), range(4))) for key in range(3000))
    assert len(orders) == 24
    assert all(59 <= count <= 191 for count in orders.values())


def test_neighbours_do_not_stay_neighbours():
    permutation = Permutation(1000, key=1)
    gaps = Counter((permutation(i + 1) - permutation(i)) % 1000 for i in range(999))
    assert max(gaps.values()) <= 10  # about Poisson(1)


@pytest.mark.parametrize("position", [-1, 5])
def test_positions_outside_are_refused(position):
    with pytest.raises(IndexError, match=r"0\.\.4"):
        Permutation(5, key=0)(position)
    with pytest.raises(ValueError, match="at least 1"):
        Permutation(0, key=0)


def test_every_pass_draws_every_image_once_in_another_order():
    passes = [[sample_index(5, 50 * turn + i, 50) for i in range(50)] for turn in range(4)]
    assert all(sorted(one) == list(range(50)) for one in passes)
    assert len(set(map(tuple, passes))) == 4


def test_another_seed_is_another_order():
    assert [sample_index(0, i, 100) for i in range(100)] != [
        sample_index(1, i, 100) for i in range(100)
    ]


@pytest.mark.parametrize("world_size", [2, 3, 4, 12])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(world_size):
    for step in (0, 1, 77):
        parts = [
            batch_positions(step, batch_size=24 // world_size, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert list(chain(*parts)) == list(batch_positions(step, batch_size=24))


def test_values_never_change():
    # Changed values would change the data of every run that is resumed.
    assert [sample_index(0, i, 1000) for i in (0, 1, 999, 1000, 10**15)] == [
        849,
        394,
        992,
        957,
        274,
    ]
