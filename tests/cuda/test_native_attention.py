"""The CUDA attention kernels, launched by their host code and executed with every check on."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dinov2_fast import native
from dinov2_fast.errors import BackendUnavailable
from dinov2_fast.ops import _attention_cuda
from dinov2_fast.ops.attention import attention
from dinov2_fast.packing import Pack
from tests.cuda import native_on_ptx
from tests.cuda.attention_calls import (
    BLOCKS,
    BOTH_LEFT,
    CROPS,
    EDGES,
    HEAD_DIM,
    LEFT,
    LEFT_UNEQUAL,
    MANY,
    MIXED,
    PARTS,
    PATCHES,
    SHORT,
    TWO_KERNELS,
    UNEQUAL,
    Case,
    adds,
    assert_matches_reference,
    equal,
    execute,
    flops,
    make_inputs,
    run,
)
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget
from tools.simt import Fault

pytestmark = pytest.mark.skipif(bool(native_on_ptx.why_not()), reason=native_on_ptx.why_not())


@pytest.mark.parametrize(
    ("case", "dtype", "arch"),
    [
        pytest.param(CROPS, torch.bfloat16, 80, id="crops"),
        pytest.param(EDGES, torch.float16, 80, id="edges"),
        pytest.param(UNEQUAL, torch.bfloat16, 80, id="unequal"),
        pytest.param(MANY, torch.bfloat16, 80, id="many"),
        pytest.param(SHORT, torch.bfloat16, 80, id="short"),
        pytest.param(TWO_KERNELS, torch.bfloat16, 80, id="two kernels"),
        *(
            pytest.param(case, dtype, arch, id=f"{name}-{arch}", marks=pytest.mark.slow)
            for name, case, dtype, arch in [
                ("crops", CROPS, torch.float16, 80),
                ("short", SHORT, torch.float16, 90),
                ("left", LEFT, torch.bfloat16, 80),
                ("left unequal", LEFT_UNEQUAL, torch.float16, 80),
                ("left unequal", LEFT_UNEQUAL, torch.bfloat16, 90),
                ("patches", PATCHES, torch.bfloat16, 80),
                ("patches", PATCHES, torch.float16, 90),
                ("blocks", BLOCKS, torch.bfloat16, 80),
                ("mixed", MIXED, torch.float16, 80),
                ("mixed", MIXED, torch.bfloat16, 90),
                ("two kernels", TWO_KERNELS, torch.float16, 90),
                ("crops", CROPS, torch.bfloat16, 90),
                ("edges", EDGES, torch.bfloat16, 80),
                ("edges", EDGES, torch.bfloat16, 90),
                ("unequal", UNEQUAL, torch.float16, 90),
            ]
        ),
    ],
)
def test_matches_the_reference_in_any_order(case: Case, dtype: torch.dtype, arch: int):
    inputs = make_inputs(case, dtype)
    out, _ = execute(case, inputs, arch=arch)
    assert_matches_reference(case, inputs, out)
    shuffled, _ = execute(case, inputs, arch=arch, schedule=1)
    assert equal(out, shuffled)


@pytest.mark.parametrize(
    ("arch", "schedule"), [(80, 1), pytest.param(90, "lockstep", marks=pytest.mark.slow)]
)
def test_sums_in_any_order_match_the_reference(arch: int, schedule: str | int):
    inputs = make_inputs(PARTS, torch.bfloat16)
    out, results = execute(PARTS, inputs, deterministic=False, arch=arch, schedule=schedule)
    assert [adds(result) for result in results] == [False, True, False]
    assert_matches_reference(PARTS, inputs, out)


def test_deterministic_algorithms_are_asked_of_torch():
    case: Case = ((1,), (265,), 1)
    inputs = make_inputs(case, torch.bfloat16)
    _, fast = execute(case, inputs, deterministic=None)
    torch.use_deterministic_algorithms(True)
    try:
        _, slow = execute(case, inputs, deterministic=None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert any(map(adds, fast))
    assert not any(map(adds, slow))


@pytest.mark.parametrize("scale", [-0.125, 0.0, 3.0])
@pytest.mark.parametrize("case", [((66,), (67,), 1), BOTH_LEFT], ids=str)  # masks in the last tile
def test_scale_may_have_any_sign(case: Case, scale: float):
    inputs = make_inputs(case, torch.bfloat16)
    out, _ = execute(case, inputs, scale)
    assert_matches_reference(case, inputs, out, scale)


# Of the third a CTA computes all, where NaN has been in shared memory. The last is one launch of
# the kernels of any length, by either of the backwards.
@pytest.mark.parametrize("in_order", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "lengths", [(20, 33, 70), (130, 257, 2), (70, 130, 33, 2, 65), (3, 265, 17, 1, 66)], ids=str
)
def test_nan_in_one_sequence_leaves_the_others_bit_equal(lengths: tuple[int, ...], in_order: bool):
    case, place = (lengths, lengths, 1), slice(lengths[0], lengths[0] + lengths[1])
    inputs = make_inputs(case, torch.bfloat16)
    options: dict[str, Any] = {"num_multiprocessors": 1, "deterministic": in_order}
    clean, _ = execute(case, inputs, **options)
    for x in inputs.values():
        x[place] = torch.nan
    dirty, _ = execute(case, inputs, **options)
    for name, tensor in dirty.items():
        rows, expected = (x.t() if name == "lse" else x for x in (tensor, clean[name]))
        others = torch.ones(rows.shape[0], dtype=torch.bool)
        others[place] = False
        assert rows[place].isnan().any(-1).all()
        assert torch.equal(rows[others], expected[others])


def test_nothing_to_compute_is_no_launch():
    case = ((0, 0), (0, 0), 2)
    out, results = execute(case, make_inputs(case, torch.bfloat16))
    assert not results
    assert all(tensor.numel() == 0 for tensor in out.values())


# The least in which every wait and barrier has something to wait for: two warps of rows, and tiles
# of columns, of which the third overwrites the first. Queries are rows of the first two kernels and
# columns of the third, which are those of more than 264 tokens. Two waits and two barriers of tiles
# each; the others are warps'. The kernel of fewer tokens has a barrier more for dS, and one for
# keys past its warps'; the least of it that needs all has three tiles of queries, or one. Where it
# computes a problem after another, two barriers change them. Its
# forward commits a group for a tile, and waits for each of four; a warp's own shared memory holds
# 16 rows, of queries and of output, and is used twice for each, and then for queries past those
# of its passes, which cost a CTA's barrier more.
@pytest.mark.parametrize(
    ("case", "kernels", "number", "deterministic"),
    [
        pytest.param(((33,), (130,), 1), slice(0, 1), 4 + 1, True, id="forward"),
        pytest.param(((257,), (256,), 1), slice(0, 1), 5 + 3 + 6, True, id="resident forward"),
        pytest.param(((33,), (265,), 1), slice(1, 2), 4 + 2, True, id="queries"),
        pytest.param(((265,), (33,), 1), slice(2, 3), 4 + 3, True, id="keys"),
        pytest.param(((130,), (257,), 1), slice(1, 2), 4 + 9, True, id="resident backward"),
        pytest.param(((34,), (34,), 1), slice(1, 2), 4 + 4, True, id="short"),
        pytest.param(((130,), (265,), 1), slice(1, 2), 4 + 6, False, id="parts"),
    ],
)
def test_every_deleted_wait_and_barrier_is_reported(
    case: Case, kernels: slice, number: int, deterministic: bool
):
    inputs = make_inputs(case, torch.bfloat16)
    options: dict[str, Any] = {"deterministic": deterministic, "num_multiprocessors": 1}
    _, results = execute(case, inputs, **options)
    deletions = list(native_on_ptx.deletions(results[kernels]))
    assert len(deletions) == number
    for edit in deletions:
        with pytest.raises(Fault):
            execute(case, inputs, edit=edit, **options)


def test_memory_is_touched_in_whole_sectors_and_without_conflicts():
    length, blocks, warps = 384, 3, 4  # no padding; every block of 128 rows reads all columns
    case: Case = ((length,), (length,), 1)
    _, results = execute(case, make_inputs(case, torch.bfloat16), profile=True)
    # Sectors of 32 bytes: of a head of a tensor, and of lse or delta.
    head, floats = length * HEAD_DIM * 2 // 32, length * 4 // 32
    loaded = [
        (1 + blocks * 2) * head,  # q; k, v
        (3 + blocks * 2) * head + floats,  # q, d_out, out, lse; k, v
        (2 + blocks * 2) * head + blocks * 2 * floats,  # k, v; q, d_out, lse, delta
    ]
    # Warps store delta four rows at a time, half a sector.
    stored = [head + floats, head + 2 * floats, 2 * head]
    counters = [result.counters for result in results]
    for result, sectors in zip(results, loaded, strict=True):
        # Besides, each warp reads four offsets, and Params, which are counted too if addressed.
        params = sum(n for inst, n in result.instructions if inst.text.startswith("ld.param"))
        beside = result.counters["global sectors, load"] - sectors - 4 * warps * blocks
        assert 0 <= beside <= params
    assert [c["global sectors, store"] for c in counters] == stored
    for kind in ("load", "store", "copy"):
        for c in counters:
            assert c[f"shared passes, {kind}"] == c[f"shared passes, {kind}, ideal"]


def test_products_are_those_of_the_padded_tiles():
    length = 289
    case: Case = ((length,), (length,), 1)
    _, results = execute(case, make_inputs(case, torch.bfloat16))
    rows, columns = 320, 304  # whole warps of 32 rows, whole steps of 16 columns
    for result, products in zip(results, (2, 3, 4), strict=True):
        assert flops(result) == products * 2 * rows * columns * HEAD_DIM


# Tokens; rows and columns of the padded tiles; products of the keys left, in the MMAs of a step of
# queries: four of scores and dP for each 8 queries, dV and dK by eight warps, dQ in 8 blocks. Then
# counts of all instructions, in PTX, which only a change of the kernel moves, or of nvcc.
@pytest.mark.parametrize(
    ("length", "rows", "columns", "left", "instructions"),
    [(257, 256, 272, 2 * 8 + 8 + 8, 89_897), (256, 256, 256, 0, 74_359), (50, 64, 64, 0, 8_614)],
)
def test_one_kernel_of_short_sequences_does_no_more_than_it_must(
    length: int, rows: int, columns: int, left: int, instructions: int
):
    case: Case = ((length,), (length,), 1)
    _, results = execute(case, make_inputs(case, torch.bfloat16), profile=True)
    _, backward = results
    steps = columns // 16
    assert flops(backward) == 5 * 2 * rows * columns * HEAD_DIM + left * steps * 4096
    assert backward.num_warp_instructions <= 1.02 * instructions
    c = backward.counters
    # The gradients of keys left are stored by elements: 8 warps, 4 stores of 4 passes, not 1.
    for kind, beside in (("load", 0), ("copy", 0), ("store", 8 * 4 * 3 if left else 0)):
        assert c[f"shared passes, {kind}"] == c[f"shared passes, {kind}, ideal"] + beside
    # Five tensors read, three written, once each; lse, and the places of sequence and head.
    assert c["touched bytes, store"] == 3 * length * HEAD_DIM * 2
    inputs = 5 * length * HEAD_DIM * 2 + length * 4
    assert inputs <= c["touched bytes, load"] <= inputs + 512
    assert c["global sectors, store"] == 3 * length * HEAD_DIM * 2 // 32


# Tokens; MMAs of a step of keys and 16 rows: 16, of which a warp has 32, and all have the queries
# left once; of keys left and 16 rows: 12. Then instructions, and passes of 128 bytes that store to
# shared memory: 32 queries and their output; for each of four warps the queries left and its sums
# of them, 8 rows of float32 and 2 for lse.
@pytest.mark.parametrize(
    ("length", "products", "instructions", "passes"),
    [
        (257, (2 * 8 + 1) * (16 * 16 + 12), 30_425, 8 * (32 + 32) + 4 * (8 + 16 + 2)),
        (256, 2 * 8 * 16 * 16, 26_448, 8 * (32 + 32)),
        (197, 2 * 7 * 13 * 16, 21_179, 7 * (32 + 32)),
    ],
)
def test_the_forward_of_short_sequences_does_no_more_than_it_must(
    length: int, products: int, instructions: int, passes: int
):
    case: Case = ((length,), (length,), 1)
    _, results = execute(case, make_inputs(case, torch.bfloat16), profile=True)
    forward, c = results[0], results[0].counters
    assert flops(forward) == products * 4096
    assert forward.num_warp_instructions <= 1.02 * instructions
    for kind in ("load", "store", "copy"):
        assert c[f"shared passes, {kind}"] == c[f"shared passes, {kind}, ideal"]
    assert c["shared passes, store"] == passes
    # Everything is read once and written once; a warp stores lse 8 rows at a time, a sector.
    tensor = length * HEAD_DIM * 2
    assert 3 * tensor <= c["touched bytes, load"] <= 3 * tensor + 512
    stored = tensor // 32 + -(-length // 8)
    assert c["global sectors, store"] == stored
    assert c["touched bytes, store"] == 32 * stored


@pytest.mark.parametrize(
    ("case", "deterministic", "delta", "sums"),
    [
        pytest.param(((264, 3), (264, 3), 1), True, False, False, id="one kernel"),
        pytest.param(((264, 3), (264, 3), 1), False, False, False, id="one kernel, any order"),
        pytest.param(TWO_KERNELS, True, True, False, id="two kernels"),
        pytest.param(PARTS, False, False, True, id="parts"),
    ],
)
def test_scratch_is_made_where_a_launch_needs_it(
    case: Case, deterministic: bool, delta: bool, sums: bool
):
    inputs = make_inputs(case, torch.bfloat16)
    with native_on_ptx.native_on_ptx(), mock.patch.object(_attention_cuda, "run_cuda") as call:
        run(case, inputs, deterministic=deterministic)
    _, backward = (each.kwargs for each in call.call_args_list)
    assert (backward["delta"] is not None) == delta
    assert (backward["d_q_sums"] is not None) == sums


def test_traced_from_any_offset():
    pack = Pack.from_groups([(2, 3)])
    storage = randn(6 * 3 * HEAD_DIM + 1, dtype=torch.bfloat16)[1:]  # no multiple of 16 bytes
    qkv = storage.view(6, 3, 1, HEAD_DIM)

    def of_views(qkv: Tensor, backend: str) -> Tensor:
        return attention(*qkv.unbind(1), pack, backend=backend)

    def outputs(function: Any, qkv: Tensor, backend: str) -> list[Tensor]:
        leaf = qkv.detach().requires_grad_()
        out = function(leaf, backend)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaf)]

    compiled = torch.compile(of_views, fullgraph=True, dynamic=False, backend="aot_eager")
    with native_on_ptx.native_on_ptx() as results:
        found = outputs(compiled, qkv, "native")
        with pytest.raises(BackendUnavailable, match="q must have its heads at multiples of 16"):
            outputs(of_views, qkv, "native")  # who is not traced is told
    assert len(results) == 2
    low, truth = (outputs(of_views, x, "reference") for x in (qkv, qkv.double()))
    for name, *candidates in zip(("out", "dqkv"), found, low, truth, strict=True):
        one, reference, exact = candidates
        assert_within_error_budget(one, low_precision=reference, truth=exact, name=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": 8}, "q must have its heads at multiples of 16 bytes"),
        ({"k_row_stride": 100}, "k must have its heads at multiples of 16 bytes"),
        ({"d_v_head_stride": 4}, "d_v must have its heads at multiples of 16 bytes"),
        ({"v": 0}, "v must not be a null pointer"),
        ({"lse": 0}, "lse must not be a null pointer"),
        ({"num_heads": -1}, "num_heads must not be negative, got -1"),
        ({"launches": (0, 1, 2)}, "launches must be five numbers each, got 3"),
        ({"launches": (0, 1, 2, -1, 0)}, r"launches must be counts below 2\^31, got -1"),
        ({"launches": (0, 2**31 - 1, 265, 1, 0)}, "launches: blocks of a head in one must be"),
        ({"launches": (0, 1, 2**31 - 1024, 1, 0)}, "launches: the longest sequence must be"),
        ({"launches": (2**31 - 1, 1, 1, 1, 0)}, "launches: sequences up to the last of one"),
        ({"launches": (0, 1, 1, 265, 1)}, "d_q_sums must not be a null pointer"),
        ({"delta": 0}, "delta must not be a null pointer"),
        ({"dtype": "float32"}, "expected float16 or bfloat16, got float32"),
    ],
)
def test_the_extension_itself_says_what_came(changes: dict[str, Any], message: str):
    good: dict[str, Any] = {"lse": 16, "delta": 16, "query_offsets": 16, "key_offsets": 16}
    for name in ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v"):
        good |= {name: 16, f"{name}_row_stride": 64, f"{name}_head_stride": 64}
    good |= {"launches": (0, 1, 265, 1, 0), "num_queries": 1, "num_heads": 1, "scale": 1.0}
    good |= {"d_q_sums": 0, "dtype": "bfloat16", "device": 0, "stream": 0}
    module = native.module()
    module.record_launches_cuda(True)
    try:
        module.attention_backward_cuda(**good)
        assert len(module.take_launches_cuda()) == 2
        module.attention_backward_cuda(**(good | {"launches": (0, 1, 264, 1, 0), "delta": 0}))
        assert len(module.take_launches_cuda()) == 1
        module.attention_backward_cuda(**(good | {"launches": (2**31 - 2, 1, 2**31 - 1025, 1, 0)}))
        assert len(module.take_launches_cuda()) == 2
        with pytest.raises(ValueError, match=f"attention_backward_cuda: {message}"):
            module.attention_backward_cuda(**(good | changes))
        assert not module.take_launches_cuda()
    finally:
        module.record_launches_cuda(False)
