from __future__ import annotations

import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2_fast.packing import MAX_TOKENS, Pack, check_cu_seqlens, pack_tokens, unpack_tokens
from tests.inputs import GROUPS, randn

# Small enough to run hundreds of cases, large enough for empty, single and repeated runs.
GROUP_LISTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=6)
LENGTH_LISTS = st.lists(st.integers(0, 9), max_size=20)


def test_known_values():
    pack = Pack.from_lengths([257, 257, 50, 0])
    assert pack.groups == ((2, 257), (1, 50), (1, 0))
    assert pack.lengths == (257, 257, 50, 0)
    assert pack.offsets_host == (0, 257, 514, 564, 564)
    assert pack.offsets.tolist() == [0, 257, 514, 564, 564]
    assert pack.offsets.dtype == torch.int32
    assert (pack.num_sequences, pack.num_tokens, pack.max_length) == (4, 564, 257)
    assert pack.group_tokens == (514, 50, 0)
    assert pack.device == torch.device("cpu")


def test_a_pack_of_nothing_is_a_pack():
    pack = Pack.from_lengths([])
    assert pack.offsets.tolist() == [0]
    assert (pack.num_sequences, pack.num_tokens, pack.max_length) == (0, 0, 0)
    assert unpack_tokens(torch.empty(0, 3), pack) == []


def test_groups_of_equal_length_stay_apart_and_runs_of_lengths_merge():
    assert Pack.from_groups([(1, 5), (1, 5)]).groups == ((1, 5), (1, 5))
    assert Pack.from_lengths([5, 5]).groups == ((2, 5),)


@given(GROUP_LISTS)
@settings(deadline=None)
def test_properties_agree_with_each_other(groups: list[tuple[int, int]]):
    pack = Pack.from_groups(groups)
    offsets = pack.offsets_host
    assert tuple(pack.offsets.tolist()) == offsets
    assert len(offsets) == pack.num_sequences + 1
    assert tuple(b - a for a, b in pairwise(offsets)) == pack.lengths
    assert offsets[-1] == pack.num_tokens == sum(pack.group_tokens) == sum(pack.lengths)
    assert pack.max_length == max(pack.lengths, default=0)


@given(LENGTH_LISTS)
@settings(deadline=None)
def test_lengths_and_cumulative_lengths_describe_the_same_pack(lengths: list[int]):
    pack = Pack.from_lengths(lengths)
    assert list(pack.lengths) == lengths
    assert Pack.from_cu_seqlens(pack.offsets, max(lengths, default=0)) == pack


@given(GROUP_LISTS.filter(bool), st.integers(0, 5))
@settings(deadline=None)
def test_unpacking_returns_what_was_packed(groups: list[tuple[int, int]], channels: int):
    batches = [randn(count, length, channels, seed=i) for i, (count, length) in enumerate(groups)]
    x, pack = pack_tokens(batches)
    assert x.shape == (pack.num_tokens, channels)
    assert pack.groups == tuple(groups)
    for batch, unpacked in zip(batches, unpack_tokens(x, pack), strict=True):
        assert torch.equal(batch, unpacked)


def test_unpacked_batches_are_views():
    x, pack = pack_tokens([randn(2, 3, 4), randn(1, 5, 4)])
    storage = x.untyped_storage().data_ptr()
    assert all(u.untyped_storage().data_ptr() == storage for u in unpack_tokens(x, pack))


def test_unpacking_keeps_further_dimensions():
    pack = Pack.from_groups([(2, 3), (1, 4)])
    shapes = [tuple(u.shape) for u in unpack_tokens(randn(10, 2, 8), pack)]
    assert shapes == [(2, 3, 2, 8), (1, 4, 2, 8)]


def test_gradients_pass_through_packing_and_unpacking():
    batches = [randn(2, 3, 4).requires_grad_(), randn(1, 5, 4, seed=1).requires_grad_()]
    parts = unpack_tokens(*pack_tokens(batches))
    (parts[0].sum() + 2 * parts[1].sum()).backward()
    assert torch.equal(batches[0].grad, torch.ones(2, 3, 4))
    assert torch.equal(batches[1].grad, torch.full((1, 5, 4), 2.0))


def test_packs_compare_by_layout_and_survive_pickling():
    pack = Pack.from_groups([(2, 3)])
    assert pack == Pack.from_lengths([3, 3])
    assert pack != Pack.from_lengths([3])
    assert pickle.loads(pickle.dumps(pack)) == pack
    assert pack.to("meta").device.type == "meta"


def test_packing_compiles_fullgraph():
    # The eager backend traces everything, which is what a pack could break, and generates no code.
    def double(batches: list[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
        x, pack = pack_tokens(batches)
        return unpack_tokens(x * 2, pack), pack.max_length + len(pack.lengths)

    batches = [randn(2, 3, 4), randn(1, 5, 4)]
    parts, number = torch.compile(double, fullgraph=True, backend="eager")(batches)
    assert number == 5 + 3
    for part, batch in zip(parts, batches, strict=True):
        assert torch.equal(part, batch * 2)


@pytest.mark.parametrize("groups", GROUPS)
def test_a_pack_enters_a_compiled_function_as_an_argument(groups: tuple[tuple[int, int], ...]):
    def total(x: torch.Tensor, pack: Pack) -> torch.Tensor:
        return sum((u.sum() for u in unpack_tokens(x, pack)), start=pack.offsets[-1].float())

    pack = Pack.from_groups(groups)
    x = torch.ones(pack.num_tokens, 2)
    out = torch.compile(total, fullgraph=True, backend="eager", dynamic=False)(x, pack)
    assert out.item() == 3 * pack.num_tokens


@pytest.mark.parametrize(
    ("offsets", "max_seqlen", "total", "message"),
    [
        ([0, 3, 2], 3, None, "non-decreasing"),
        ([1, 3], 3, None, "start at 0"),
        ([-1, 3], 4, None, "start at 0"),
        ([0, 3], 3, 4, "number of tokens 4, got 3"),
        ([0, 3, 9], 5, 9, "at least 6"),
        ([], 0, None, r"\(S \+ 1,\)"),
        ([[0, 3]], 3, None, r"\(S \+ 1,\)"),
    ],
)
def test_rejects_wrong_cumulative_lengths(
    offsets: list[int], max_seqlen: int, total: int | None, message: str
):
    with pytest.raises(ValueError, match=message):
        check_cu_seqlens(torch.tensor(offsets, dtype=torch.int32), max_seqlen, total)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.float32])
def test_rejects_cumulative_lengths_of_another_type(dtype: torch.dtype):
    with pytest.raises(ValueError, match=r"torch\.int32"):
        check_cu_seqlens(torch.tensor([0, 3], dtype=dtype), 3)


@given(st.lists(st.integers(-3, 12), max_size=6), st.integers(-1, 12), st.integers(-1, 12))
@settings(deadline=None, max_examples=300)
def test_cumulative_lengths_pass_exactly_when_they_describe_sequences(
    offsets: list[int], max_seqlen: int, total: int
):
    lengths = [b - a for a, b in pairwise(offsets)]
    valid = bool(offsets) and offsets[0] == 0 and offsets[-1] == total
    valid = valid and all(0 <= length <= max_seqlen for length in lengths) and max_seqlen >= 0
    tensor = torch.tensor(offsets, dtype=torch.int32)
    if valid:
        assert check_cu_seqlens(tensor, max_seqlen, total) == tuple(offsets)
    else:
        with pytest.raises(ValueError, match="seqlen"):
            check_cu_seqlens(tensor, max_seqlen, total)


def test_rejects_bad_input():
    with pytest.raises(ValueError, match="non-negative"):
        Pack.from_groups([(1, -2)])
    with pytest.raises(ValueError, match="non-negative"):
        Pack.from_lengths([3, -1])
    with pytest.raises(ValueError, match="int32 offsets"):
        Pack.from_groups([(2, MAX_TOKENS)])
    with pytest.raises(ValueError, match="at least one batch"):
        pack_tokens([])
    with pytest.raises(ValueError, match=r"\[S, N, C\]"):
        pack_tokens([randn(3, 4)])
    with pytest.raises(ValueError, match="4 channels"):
        pack_tokens([randn(1, 3, 4), randn(1, 3, 5)])
    with pytest.raises(ValueError, match=r"torch\.float32 on cpu"):
        pack_tokens([randn(1, 3, 4), randn(1, 3, 4).double()])
    with pytest.raises(ValueError, match="6 tokens"):
        unpack_tokens(randn(7, 4), Pack.from_groups([(2, 3)]))
