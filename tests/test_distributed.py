from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from dinov2_fast import distributed
from dinov2_fast.ops.sinkhorn import sinkhorn
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget

WORLD_SIZE = 2
TEMPERATURE = 0.05

# Rows of each process, as masked patches have them: ragged, equal, and none on one process.
ROWS = {"ragged": (13, 4), "equal": (8, 8), "one_without": (0, 7), "none_at_all": (0, 0)}


def rows_of(case: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Every process's logits; large enough to overflow exp in float32 without a shift."""
    counts = ROWS[case]
    return randn(sum(counts), 31, scale=2.0).to(dtype).split(counts)


def work(rank: int, folder: str) -> None:
    """What each process does; its results go to a file."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE
    )
    value = torch.tensor([rank + 1.0, -rank])
    outcome = {
        "state": torch.tensor(
            [distributed.is_initialized(), distributed.rank(), distributed.world_size()]
        ),
        "sum": distributed.all_reduce_sum(value.clone()),
        "max": distributed.all_reduce_max(value.clone()),
        "mean": distributed.all_reduce_mean(value.clone()),
        "broadcast": distributed.broadcast(value.clone(), source=1),
    }
    alone = dist.new_group([rank], use_local_synchronization=True)
    outcome["sum_alone"] = distributed.all_reduce_sum(value.clone(), alone)
    for case in ROWS:
        for dtype in (torch.float32, torch.float64):
            logits = rows_of(case, dtype)[rank]
            outcome[f"{case} {dtype}"] = sinkhorn(logits, temperature=TEMPERATURE)
    logits = rows_of("ragged", torch.float64)[rank]
    outcome["subgroup"] = sinkhorn(logits, temperature=TEMPERATURE, group=alone)
    distributed.barrier()
    torch.save(outcome, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Results of two gloo processes on this machine, started once for the whole file."""
    folder: Path = tmp_path_factory.mktemp("distributed")
    # The fork server imports torch once for both; plain fork would copy this process's threads.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    multiprocessing.start_processes(
        work, args=(str(folder),), nprocs=WORLD_SIZE, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


def test_without_a_group_everything_is_the_identity():
    value = torch.tensor([3.0, -1.0])
    assert not distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    for function in (
        distributed.all_reduce_sum,
        distributed.all_reduce_max,
        distributed.all_reduce_mean,
        distributed.broadcast,
    ):
        out = value.clone()
        assert function(out) is out
        assert torch.equal(out, value)
    distributed.barrier()


def test_two_processes_know_each_other(outcomes: list[dict]):
    for rank, outcome in enumerate(outcomes):
        assert outcome["state"].tolist() == [1, rank, 2]


def test_two_processes_reduce_and_broadcast(outcomes: list[dict]):
    for rank, outcome in enumerate(outcomes):
        assert outcome["sum"].tolist() == [3.0, -1.0]
        assert outcome["max"].tolist() == [2.0, 0.0]
        assert outcome["mean"].tolist() == [1.5, -0.5]
        assert outcome["broadcast"].tolist() == [2.0, -1.0]
        assert outcome["sum_alone"].tolist() == [rank + 1.0, -rank]


def targets(logits: torch.Tensor, vectors: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (logits / TEMPERATURE + vectors[0] + vectors[1].unsqueeze(1)).exp()


@pytest.mark.parametrize("case", [case for case in ROWS if case != "none_at_all"])
def test_sinkhorn_over_two_processes_equals_one_process(outcomes: list[dict], case: str):
    both = {}
    for dtype in (torch.float32, torch.float64):
        parts = rows_of(case, dtype)
        both[dtype] = torch.cat(
            [
                targets(part, outcome[f"{case} {dtype}"])
                for part, outcome in zip(parts, outcomes, strict=True)
            ]
        )
    whole = {dtype: torch.cat(rows_of(case, dtype)) for dtype in both}
    single = {d: targets(x, sinkhorn(x, temperature=TEMPERATURE)) for d, x in whole.items()}
    torch.testing.assert_close(both[torch.float64], single[torch.float64], rtol=1e-11, atol=1e-14)
    assert_within_error_budget(
        both[torch.float32],
        low_precision=single[torch.float32],
        truth=single[torch.float64],
        name=f"sinkhorn.{case}",
    )


@pytest.mark.parametrize("case", ROWS)
def test_every_process_holds_the_same_prototype_vector(outcomes: list[dict], case: str):
    first, second = (outcome[f"{case} {torch.float32}"][0] for outcome in outcomes)
    assert torch.equal(first, second)
    assert first.isfinite().all()


def test_sinkhorn_of_a_subgroup_sees_its_own_rows_only(outcomes: list[dict]):
    for logits, outcome in zip(rows_of("ragged", torch.float64), outcomes, strict=True):
        expected = sinkhorn(logits, temperature=TEMPERATURE)
        for vector, expected_vector in zip(outcome["subgroup"], expected, strict=True):
            torch.testing.assert_close(vector, expected_vector, rtol=1e-12, atol=1e-12)
