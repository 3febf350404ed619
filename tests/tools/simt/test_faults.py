"""Kernels of ours: right ones run in any order, planted faults and deletions are reported."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools import simt
from tools.simt.proofs.deletions import delete_each
from tools.simt.proofs.own_programs import OWN, Program
from tools.simt.proofs.planted import PLANTED, Planted

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def named(programs):
    return [pytest.param(program, id=program.name.replace(" ", "-")) for program in programs]


@pytest.mark.parametrize("schedule", ["lockstep", 1, 2])
@pytest.mark.parametrize("program", named(OWN))
def test_right_kernels_run_in_any_order(program: Program, schedule: str | int):
    error, _ = program.run(program.ptx(), schedule=schedule)
    assert error <= program.tolerance


@pytest.mark.parametrize("schedule", ["lockstep", 1])
@pytest.mark.parametrize("planted", named(PLANTED))
def test_planted_faults_are_reported(planted: Planted, schedule: str | int):
    fault = planted.report(schedule=schedule)
    assert fault is not None
    assert fault.kind in planted.kinds
    if fault.kind != "deadlock":  # whose report lists every warp
        assert fault.line
        assert fault.source
        assert "by CTA (" in str(fault)


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [
        ((1, 0), 32, r"grid must be from 1 to \(2147483647, 65535, 65535\), got \(1, 0, 1\)"),
        (2**31, 32, "grid must be from 1 to"),
        ((1, 65536), 32, "grid must be from 1 to"),
        (1, 0, r"block must be from 1 to \(1024, 1024, 64\), got \(0, 1, 1\)"),
        (1, (1, 1, 65), "block must be from 1 to"),
        (1, (64, 17), r"block must have at most 1024 threads, got \(64, 17, 1\)"),
    ],
)
def test_what_cuda_does_not_launch_is_refused(grid: Any, block: Any, message: str):
    ptx = simt.compile_cu(Path(__file__).parent / "programs" / "softmax.cu")
    x = np.ones((1, 4), np.float32)
    with pytest.raises(ValueError, match=f"launch: {message}"):
        simt.launch(ptx, "softmax_kernel", grid, block, [x, simt.Output(x.copy()), 4])


def test_a_report_names_the_place_the_lane_and_the_byte():
    planted = next(p for p in PLANTED if p.name == "read past the end")
    text = str(planted.report())
    assert "first at 3600 bytes into 'softmax_kernel_param_0' of 3600 bytes" in text
    assert "softmax.cu:" in text
    assert "PTX line" in text
    assert "CTA (2, 0, 0), warp 1, lane 12 (thread 44)" in text


def test_missing_barriers_that_change_no_result_are_reported():
    # What a test that only looks at results would miss.
    quiet = {
        "missing __syncthreads before a read",
        "missing __syncthreads before a write",
        "missing __syncthreads before the next cp.async",
    }
    for planted in [p for p in PLANTED if p.name in quiet]:
        ptx = planted.edit(planted.program.ptx())
        error, _ = planted.program.run(ptx, checks=simt.Checks.none())
        assert error <= planted.program.tolerance, planted.name


QUIET = {
    "read past the end": {"bounds": False, "uninitialised": "poison"},
    "misaligned pointer": {"misaligned": False},
    "missing __syncwarp": {"race": False},
    "missing __syncthreads before the next cp.async": {"race": False},
    "wait_group 2 for 1": {"in_flight": False, "race": False, "uninitialised": "poison"},
    "dropped fence.proxy.async": {"proxy": False},
    "CTAs that meet without a counter": {"global_race": False},
    "global memory read before it is written": {"uninitialised": "poison"},
    "stage released before wait_group": {"race": False},
    "collective in half a warp": {"divergence": False},
    "wgmma without wgmma.fence": {"wgmma": False},
    "left with cp.async on its way": {"pending": False},
    "left with a bulk load on its way": {"pending": False},
    "left with a bulk store on its way": {"pending": False},
    "two values stored at once": {"same_store": False},
    "mbarrier initialised twice": {"mbarrier": False},
}


def test_every_check_is_turned_off_by_one_of_these():
    turned_off = {name for options in QUIET.values() for name in options}
    assert turned_off == {field.name for field in dataclasses.fields(simt.Checks)}


@pytest.mark.parametrize("name", QUIET)
def test_a_check_can_be_turned_off(name: str):
    planted = next(p for p in PLANTED if p.name == name)
    assert planted.report(checks=simt.Checks(**QUIET[name])) is None


def test_poison_counts_what_was_read_before_it_was_written():
    planted = next(p for p in PLANTED if p.name == "shared memory read before it is written")
    checks = simt.Checks(uninitialised="poison", race=False)
    ptx = planted.program.ptx(*planted.defines)
    _, result = planted.program.run(ptx, checks=checks, schedule=1)
    assert result.counters["uninitialised shared reads"] > 0


@pytest.mark.parametrize("program", named(OWN))
def test_every_deleted_synchronisation_is_reported(program: Program):
    outcomes = delete_each(program)
    assert outcomes
    assert not [o.inst for o in outcomes if not o.reported]
