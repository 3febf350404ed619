"""Warp instructions of the CUDA kernels, in PTX: only a change of a kernel moves them, or of nvcc.

Attention's of 129 to 264 tokens stand with its other counters.
"""

from __future__ import annotations

import pytest
import torch

from tests.cuda import native_on_ptx
from tools.kernel_report.attention_cases import run_attention, run_in_order
from tools.kernel_report.cases import Run, Types, as_it_is
from tools.kernel_report.loss_cases import (
    run_cross_entropy,
    run_koleo,
    run_optimizer,
    run_sinkhorn,
)
from tools.kernel_report.row_cases import (
    run_gelu,
    run_layer_norm,
    run_stochastic_depth,
    run_swiglu,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(native_on_ptx.why_not()), reason=native_on_ptx.why_not()),
]

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


# Two tiles of 8 rows of ViT-B's width or half its hidden one; whole parts of rows of prototypes;
# one chunk, with a table before each of two calls; sequences of two warps, and of one token too
# many for one kernel. Launches in order, with the dynamic shared memory of a CTA in bytes: the
# layer norm keeps rows, four of its forward, one and three sums of its backward; attention keeps
# tiles.
@pytest.mark.parametrize(
    ("run", "sizes", "types", "launches"),
    [
        (run_layer_norm, (16, 768), (FLOAT, BFLOAT), [(8_480, 12_288), (36_096, 12_288)]),
        (run_stochastic_depth, (16, 768), (FLOAT, BFLOAT), [(8_448, 0), (13_200, 0)]),
        (run_gelu, (16, 1536), (BFLOAT, BFLOAT), [(29_664, 0), (59_136, 0)]),
        (run_swiglu, (16, 1536), (BFLOAT, BFLOAT), [(14_208, 0), (39_648, 0)]),
        (run_sinkhorn, (16, 2048), (HALF,), [(30_848, 0), (30_052, 0), (30_052, 0)]),
        (run_cross_entropy, (16, 2048), (FLOAT, HALF), [(106_477, 0), (67_712, 0)]),
        (run_koleo, (16, 384), (FLOAT,), [(3_536, 0), (6_164, 0), (5_808, 0), (15_792, 0)]),
        (
            run_optimizer,
            (16_384,),
            (FLOAT, BFLOAT),
            [(75, 0), (3_132, 0), (6_110, 0), (75, 0), (20_864, 0)],
        ),
        (run_attention, (50,), (BFLOAT,), [(3_571, 24_576), (8_614, 33_632)]),
        (
            run_attention,
            (265,),
            (BFLOAT,),
            [(32_554, 49_152), (103_116, 166_816), (3_277, 0)],
        ),
        (
            run_in_order,
            (265,),
            (BFLOAT,),
            [(32_554, 49_152), (48_740, 66_048), (54_335, 66_560)],
        ),
    ],
)
def test_kernels_take_no_more_instructions_and_shared_memory_than_planned(
    run: Run, sizes: tuple[int, ...], types: Types, launches: list[tuple[int, int]]
):
    with native_on_ptx.native_on_ptx() as results:
        list(run(sizes, types, as_it_is, "native"))
    for result, (instructions, shared_bytes) in zip(results, launches, strict=True):
        assert result.num_warp_instructions <= 1.02 * instructions
        assert result.dynamic_shared_bytes == shared_bytes
