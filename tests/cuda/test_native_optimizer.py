"""The CUDA kernels of csrc/cuda/optimizer.cu, launched by their host code and executed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast.ops import _optimizer_cuda
from dinov2_fast.ops._native_cuda import run_cuda
from dinov2_fast.ops.optimizer import adamw_ema_reference, adamw_ema_step, gradient_norm
from tests.cuda import native_on_ptx
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget
from tools.simt import Fault

# Empty ones first, last and in a row; a scalar, primes, and one past the edge of a chunk.
SIZES = [0, 1, 61, 0, 0, _optimizer_cuda.CHUNK + 5, 384, 0]
FEW = [61, 0, 384]
NUMBERS: dict[str, Any] = {
    "lr": 1e-2,
    "weight_decay": 0.3,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "step": 7,
    "momentum": 0.9,
}
STATES = ("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "ema_parameters")
PADDING = 8  # elements of NaN after each tensor
Lists = dict[str, list[Tensor]]

pytestmark = pytest.mark.skipif(bool(native_on_ptx.why_not()), reason=native_on_ptx.why_not())


def in_poison(values: Tensor, offset: int, storages: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The values in storage of NaN, some elements from its beginning."""
    storage = torch.full((offset + len(values) + PADDING,), math.nan, dtype=values.dtype)
    view = storage[offset : offset + len(values)]
    view.copy_(values)
    storages.append((storage, view))
    return view


def make_lists(sizes: list[int], offset: int = 0, storages: list | None = None) -> Lists:
    """State as after some steps, with 16-bit copies of any content."""
    storages = [] if storages is None else storages
    lists: Lists = {}
    for place, name in enumerate(STATES):
        values = [randn(size, seed=10 * place + i) for i, size in enumerate(sizes)]
        if name == "exp_avg_sqs":
            values = [x.square() for x in values]
        lists[name] = [in_poison(x, offset, storages) for x in values]
    return lists


def make_copies(sizes: list[int], dtype: torch.dtype, offset: int, storages: list) -> list[Tensor]:
    return [in_poison(torch.zeros(size, dtype=dtype), offset, storages) for size in sizes]


def copied(lists: Lists, dtype: torch.dtype = torch.float32) -> Lists:
    return {name: [x.clone().to(dtype) for x in xs] for name, xs in lists.items()}


def reference_step(lists: Lists, dtype: torch.dtype, scale: float) -> Lists:
    after = copied(lists, dtype)
    for tensors in zip(*after.values(), strict=True):
        adamw_ema_reference(*tensors, gradient_scale=scale, skip=None, **NUMBERS)
    return after


def same(a: Lists, b: Lists) -> bool:
    return all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))


def run_step(lists: Lists, *, scale: Any = 0.5, skip: Any = None, **options: Any) -> list[Any]:
    """One step by the kernel; the results of its launches."""
    copies = {name: options.pop(name) for name in ("copies", "ema_copies") if name in options}
    numbers = NUMBERS | {name: options.pop(name) for name in NUMBERS if name in options}
    states = [lists[name] for name in STATES]
    with native_on_ptx.native_on_ptx(**options) as results:
        _optimizer_cuda.step(*states, gradient_scale=scale, skip=skip, **copies, **numbers)
    return results


@pytest.mark.parametrize(("offset", "dtype"), [(0, torch.bfloat16), (1, torch.float16)], ids=str)
@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_tensors_of_any_size_match_the_reference(arch: int, offset: int, dtype: torch.dtype):
    storages: list[tuple[Tensor, Tensor]] = []
    lists = make_lists(SIZES, offset, storages)
    copies, ema_copies = (make_copies(SIZES, dtype, offset, storages) for _ in range(2))
    low, truth = (reference_step(lists, kind, 0.5) for kind in (torch.float32, torch.float64))
    before = copied(lists)

    with native_on_ptx.native_on_ptx(arch) as results:
        options = {"copies": copies, "ema_copies": ema_copies, "gradient_scale": 0.5}
        adamw_ema_step(**lists, **options, **NUMBERS, backend="native")

    assert len(results) == 2
    assert all(map(torch.equal, lists["gradients"], before["gradients"]))
    for name, tensors in lists.items():
        for index, tensor in enumerate(tensors):
            assert_within_error_budget(
                tensor,
                low_precision=low[name][index],
                truth=truth[name][index],
                name=f"optimizer.{name}[{index}]",
            )
    for copy, source in zip(
        copies + ema_copies, lists["parameters"] + lists["ema_parameters"], strict=True
    ):
        assert torch.equal(copy, source.to(dtype))
    for storage, view in storages:
        view.fill_(math.nan)
        assert storage.isnan().all()  # what lies around the tensors was left alone


def test_no_order_of_warps_changes_a_bit():
    lists, shuffled = make_lists(FEW), make_lists(FEW)
    run_step(lists)
    run_step(shuffled, schedule=1)
    assert same(lists, shuffled)
    with native_on_ptx.native_on_ptx():
        norm = gradient_norm(lists["gradients"], backend="native")
    with native_on_ptx.native_on_ptx(schedule=1):
        assert torch.equal(gradient_norm(lists["gradients"], backend="native"), norm)


def test_alignment_changes_no_bit_of_a_step():
    lists, unaligned = make_lists(FEW), make_lists(FEW, offset=1)
    run_step(lists)
    run_step(unaligned)
    assert same(lists, unaligned)


@pytest.mark.parametrize("unaligned", STATES)
def test_one_list_alone_may_be_unaligned(unaligned: str):
    lists, expected = make_lists(FEW), make_lists(FEW)
    lists[unaligned] = make_lists(FEW, offset=1)[unaligned]
    run_step(lists)
    run_step(expected)
    assert same(lists, expected)


def test_a_copy_may_be_missing_of_either():
    lists, plain = make_lists([61, 64, 384, 8]), make_lists([61, 64, 384, 8])
    # Copies alone may be unaligned.
    first, second, third = (torch.zeros(n + 1, dtype=torch.float16)[1:] for n in (61, 64, 384))
    copies = [first, None, third, None]
    ema_copies = [None, second, torch.zeros_like(third), None]
    run_step(lists, copies=copies, ema_copies=ema_copies)
    run_step(plain)
    assert same(lists, plain)
    for written, name in ((copies, "parameters"), (ema_copies, "ema_parameters")):
        for copy, source in zip(written, lists[name], strict=True):
            assert copy is None or torch.equal(copy, source.half())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_skipped_on_the_device_writes_nothing(value: float):
    lists = make_lists(FEW)
    lists["gradients"][2].fill_(value)
    before = copied(lists)
    copies = [torch.zeros(size, dtype=torch.bfloat16) for size in FEW]
    scale = torch.tensor(value)
    options = {"copies": copies, "ema_copies": copies, "scale": scale}
    run_step(lists, skip=torch.tensor(True), **options)
    del lists["gradients"], before["gradients"]
    assert same(lists, before)
    assert not any(copy.any() for copy in copies)


def test_numbers_on_the_device_make_the_same_step():
    lists, expected = make_lists(FEW), make_lists(FEW)
    run_step(lists, scale=torch.tensor(0.25), skip=torch.tensor(False))
    run_step(expected, scale=0.25)
    assert same(lists, expected)


def test_averages_without_memory_are_the_new_values():
    lists = make_lists(FEW)
    run_step(lists, beta1=0.0, momentum=0.0)
    for gradient, exp_avg in zip(lists["gradients"], lists["exp_avgs"], strict=True):
        assert torch.equal(exp_avg, 0.5 * gradient)
    assert all(map(torch.equal, lists["ema_parameters"], lists["parameters"]))


def test_a_nan_stays_in_its_place():
    clean, dirty = make_lists(FEW), make_lists(FEW)
    dirty["gradients"][2][17] = math.nan
    run_step(clean)
    run_step(dirty)
    for name in ("parameters", "exp_avgs", "exp_avg_sqs", "ema_parameters"):
        assert torch.equal(dirty[name][0], clean[name][0])
        assert dirty[name][2].isnan().nonzero().flatten().tolist() == [17]
        clean[name][2][17] = dirty[name][2][17] = 0.0
        assert torch.equal(dirty[name][2], clean[name][2])


@pytest.mark.parametrize("offset", [0, 1])
def test_norm_matches_the_reference(offset: int):
    gradients = make_lists(SIZES, offset)["gradients"]
    with native_on_ptx.native_on_ptx() as results:
        norm = gradient_norm(gradients, backend="native")
    assert len(results) == 3
    flat = torch.cat(gradients)
    assert_within_error_budget(
        norm, low_precision=flat.norm(), truth=flat.double().norm(), name="gradient_norm"
    )


@pytest.mark.parametrize(
    ("value", "norm"),
    [(math.nan, math.nan), (math.inf, math.inf), (1e30, math.inf), (3e-30, 3e-30)],
)
def test_norm_of_numbers_out_of_the_ordinary(value: float, norm: float):
    gradients = [torch.zeros(61), torch.zeros(0), torch.zeros(8)]
    gradients[2][5] = value
    with native_on_ptx.native_on_ptx():
        out = gradient_norm(gradients, backend="native")
    torch.testing.assert_close(out.item(), norm, rtol=1e-6, atol=0.0, equal_nan=True)


def test_norm_of_many_chunks(monkeypatch: pytest.MonkeyPatch):
    # More chunks than the CTA that adds them has threads: they are of four elements here.
    monkeypatch.setattr(_optimizer_cuda, "CHUNK", 4)
    gradients = [randn(4099), randn(61)]
    with native_on_ptx.native_on_ptx():
        norm = gradient_norm(gradients, backend="native")
    flat = torch.cat(gradients)
    assert_within_error_budget(
        norm, low_precision=flat.norm(), truth=flat.double().norm(), name="gradient_norm"
    )


def test_empty_tensors_have_no_norm_and_no_step():
    lists = make_lists([0, 0])
    assert len(run_step(lists)) == 1  # of the table
    with native_on_ptx.native_on_ptx() as results:
        assert gradient_norm(lists["gradients"], backend="native").item() == 0.0
    assert len(results) == 2


def test_a_table_of_any_length_reaches_the_device():
    # No number, one, and launches of as many as their parameters hold; 64 bits of each.
    for count in (0, 1, 510, 511, 1021):
        table = torch.full((count + PADDING,), -7)
        numbers = tuple((2**40 + 1) * i - 2**62 for i in range(count))
        with native_on_ptx.native_on_ptx() as results:
            run_cuda("optimizer_table_cuda", table=table, numbers=numbers)
        assert len(results) == -(-count // 510)
        assert table.tolist() == [*numbers, *[-7] * PADDING]


def test_warps_touch_whole_sectors():
    lists = make_lists([4096])
    copies = [[torch.zeros(4096, dtype=torch.bfloat16)] for _ in range(2)]
    _, result = run_step(lists, copies=copies[0], ema_copies=copies[1], profile=True)
    sectors = result.counters["global sectors, store"]
    assert sectors * 32 == result.counters["global bytes, store"] == 4096 * (4 * 4 + 2 * 2)
    # Of vectors of 16 bytes, which are 8 of a copy.
    requests = 4096 // (32 * 4)
    assert result.counters["global requests, store"] == requests * (4 + 2)
    # Every warp also finds its chunk in the table: addresses, a size and a place.
    warps, numbers = 8, 12
    assert result.counters["global sectors, load"] <= 4096 * 5 * 4 // 32 + warps * numbers


def test_the_norm_reads_each_gradient_once_in_vectors():
    gradients, chunks, warps = [randn(4096), randn(1024)], 2, 8
    with native_on_ptx.native_on_ptx(profile=True) as results:
        gradient_norm(gradients, backend="native")
    vectors = sum(gradient.nbytes for gradient in gradients) // 16
    _, squares, total = (result.counters for result in results)  # the first writes the table
    # Every warp also finds its chunk in the table: an address, a size and a place.
    beside = squares["global requests, load"] - vectors // 32
    assert 0 <= beside <= chunks * warps * 6
    assert 0 <= squares["global sectors, load"] - vectors // 2 <= beside
    assert squares["global requests, store"] == chunks  # a number each
    assert total["global sectors, load"] == total["global requests, store"] == 1
    for c in (squares, total):
        for kind in ("load", "store"):
            assert c[f"shared passes, {kind}"] == c[f"shared passes, {kind}, ideal"]


def test_every_deleted_barrier_is_reported():
    gradients = [randn(2 * _optimizer_cuda.CHUNK)]

    def norm(**options: Any) -> list[Any]:
        with native_on_ptx.native_on_ptx(**options) as results:
            gradient_norm(gradients, backend="native")
        return results

    deletions = list(native_on_ptx.deletions(norm()))
    assert len(deletions) == 2
    for edit in deletions:
        with pytest.raises(Fault):
            norm(edit=edit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 6}, "chunk must be a multiple of 4"),
        ({"num_tensors": 0}, "num_tensors must be at least 1"),
        ({"num_chunks": -1}, "num_chunks must not be negative, got -1"),
        ({"copies_dtype": "float32"}, "copies_dtype must be float16 or bfloat16"),
        ({"step": 0}, "step must be at least 1"),
    ],
)
def test_the_binding_rejects_what_it_cannot_compute(changes: dict[str, Any], message: str):
    good = {"table": torch.zeros(9, dtype=torch.int64), "num_tensors": 1, "num_chunks": 0}
    good |= {"chunk": 4, "scale": None, "gradient_scale": 1.0, "skip": None, "changing": None}
    good |= {"copies_dtype": "bfloat16", **NUMBERS}
    with native_on_ptx.native_on_ptx(), pytest.raises(ValueError, match=message):
        run_cuda("optimizer_step_cuda", **(good | changes))
