"""The CUDA backward of 65 to 264 tokens: problems that a CTA computes one after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cuda import native_on_ptx
from tests.cuda.attention_calls import (
    HEAD_DIM,
    WALK,
    Case,
    assert_matches_reference,
    equal,
    execute,
    flops,
    make_inputs,
)
from tools.kernel_report.pipes import work_of
from tools.kernel_report.waiting import waiting_of
from tools.simt.report import A100, H100

pytestmark = pytest.mark.skipif(bool(native_on_ptx.why_not()), reason=native_on_ptx.why_not())


# CTAs of seven problems; of four and three; of one.
@pytest.mark.parametrize(
    ("num_multiprocessors", "arch", "schedule"),
    [
        (1, 80, "lockstep"),
        pytest.param(1, 80, 1, marks=pytest.mark.slow),
        pytest.param(2, 80, 2, marks=pytest.mark.slow),
        pytest.param(1, 90, "lockstep", marks=pytest.mark.slow),
        pytest.param(2, 90, "lockstep", marks=pytest.mark.slow),
    ],
)
def test_problems_of_one_cta_have_the_bits_of_one_cta_each(
    num_multiprocessors: int, arch: int, schedule: str | int
):
    inputs = make_inputs(WALK, torch.bfloat16)
    alone, (_, backward) = execute(WALK, inputs, arch=arch)
    assert backward.num_ctas == len(WALK[0])
    assert_matches_reference(WALK, inputs, alone)
    options: dict[str, Any] = {"num_multiprocessors": num_multiprocessors, "schedule": schedule}
    out, (_, backward) = execute(WALK, inputs, arch=arch, **options)
    assert backward.num_ctas == num_multiprocessors
    assert equal(out, alone)


# The first problem of a CTA waits for keys, values, and a tile of queries with dO, output and lse.
# A later one waits for less than 2 % of its products: what is stored before it is in its way.
def test_later_problems_arrive_while_others_are_computed():
    length, many = 257, {}
    for heads in (1, 3):
        case: Case = ((length,), (length,), heads)
        inputs = make_inputs(case, torch.bfloat16)
        _, results = execute(case, inputs, profile=True, num_multiprocessors=1)
        many[heads] = results[1]
    first_bytes = (2 * length + 3 * 64) * HEAD_DIM * 2 + 64 * 4
    for gpu in (A100, H100):
        one, three = (waiting_of(work_of(r), r.traffic, gpu) for r in many.values())
        bytes_per_cycle = gpu.dram_gb_s / gpu.clock_ghz / gpu.num_sms
        assert one.waiting == pytest.approx(first_bytes / bytes_per_cycle, rel=1e-3)
        assert three.waiting - one.waiting < 0.02 * (three.computing - one.computing)
    # Nothing is multiplied, copied, read or written twice.
    c, tensor = many[3].counters, 3 * length * HEAD_DIM * 2
    assert flops(many[3]) == 3 * flops(many[1])
    assert c["shared passes, copy"] == 3 * many[1].counters["shared passes, copy"]
    assert 0 <= c["touched bytes, load"] - 5 * tensor - 3 * length * 4 <= 512
    assert c["global sectors, store"] == 3 * tensor // 32
