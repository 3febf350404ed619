"""Triton compiles its kernels for GPUs that this machine need not have."""

from __future__ import annotations

import re

import pytest
import torch

from dinov2_fast import environment
from tools.kernel_report.machine_code import of_cubin
from tools.simt.triton_launch import Compiled
from tools.triton_report.calls import CALLS, HEADS, Call, attention, attention_of, optimizer

pytest.importorskip("triton")
if environment.triton_interpreted():
    pytest.skip("Triton interprets", allow_module_level=True)

from tools.triton_report.__main__ import compiled

# Of a multiprocessor. Shared memory is that of the smallest since sm_80, sm_86's of 100 KiB, of
# which every block of threads loses one.
REGISTERS, SHARED_BYTES = 65536, 99 * 1024
SIXTEEN_BYTES = r"ld\.global(\.\w+)*\.v4\.b32|cp\.async\.cg\.shared\.global .*, 0x10"
PRODUCTS = {80: "mma.sync", 90: "wgmma.mma_async"}


def assert_fits(launch: Compiled, threads: int) -> None:
    """Next to nothing in local memory, and room for so many threads on a multiprocessor."""
    code, name = of_cubin(launch.cubin), f"{launch.kernel} of {launch.constants}"
    assert code.spilled_bytes <= 16, name  # ptxas may keep a number or two across a division
    assert code.stack_bytes <= 16, name
    blocks = -(-threads // (32 * launch.num_warps))
    assert code.registers * 32 * launch.num_warps * blocks <= REGISTERS, name
    assert launch.shared_bytes * blocks <= SHARED_BYTES, name


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow)])
@pytest.mark.parametrize("call", [call for call in CALLS if call is not attention])
def test_kernels_compile_without_spills(call: Call, arch: int):
    launches = compiled(call, arch)
    assert len(launches) == CALLS[call]
    for launch in launches:
        # The optimizer learns from memory where a tensor ends: its masks are of single elements.
        assert (call is optimizer) != bool(re.search(SIXTEEN_BYTES, launch.ptx)), launch.kernel
        assert_fits(launch, 256)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("head_dim", "dtype"), HEADS)
def test_attention_compiles_without_spills(head_dim: int, dtype: torch.dtype, arch: int):
    launches = compiled(attention_of(head_dim, dtype), arch)
    tiles = {(launch.kernel, launch.constants["BLOCK_Q"]) for launch in launches}
    assert len(tiles) == (4 if dtype == torch.float32 else 5)  # long forwards have a tile more
    for launch in launches:
        assert_fits(launch, 32 * launch.num_warps)
        assert re.search(SIXTEEN_BYTES, launch.ptx), launch.kernel
        # Float32 has no tensor cores that keep its precision.
        assert (dtype != torch.float32) == (PRODUCTS[arch] in launch.ptx), launch.kernel
        assert bool(re.search(r"\bmma|wgmma", launch.ptx)) == (dtype != torch.float32)
