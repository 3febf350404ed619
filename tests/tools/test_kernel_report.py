"""`python -m tools.kernel_report`: what it says of kernels, and that it says what is missing."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.source_files import ROOT
from tools import simt
from tools.kernel_report import __main__ as command
from tools.kernel_report import flash_attention
from tools.kernel_report.cases import Case
from tools.kernel_report.kernels import Execution, Instance, execute, instances
from tools.kernel_report.machine_code import MachineCode, machine_code, short
from tools.kernel_report.page import attention_table, kernel_table
from tools.kernel_report.pipes import Work, bound, cycles, work_of
from tools.kernel_report.waiting import Waiting, waiting_of
from tools.simt.core import Traffic
from tools.simt.native_launch import why_not
from tools.simt.report import A100, H100, pipe_of

PAGE = ROOT / "docs" / "cuda-kernels.md"
WAY_OUT = "python -m tools.kernel_report > docs/cuda-kernels.md"
pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture(scope="module")
def gelu() -> dict[str, Any]:
    """The report of the file that is compiled fastest."""
    report, problems = command.made(["gelu"], (80, 90))
    assert not problems
    return report


def test_every_instance_is_executed_within_the_references_error(gelu: dict[str, Any]):
    assert json.loads(json.dumps(gelu, allow_nan=False)) == gelu
    rows = gelu["kernels"]
    types = ("float", "__half", "__nv_bfloat16")
    assert {(row["name"], row["arch"]) for row in rows} == {
        (f"gelu_{direction}_kernel<{kind}, {vector}>", arch)
        for direction in ("forward", "backward")
        for kind in types
        for vector in (1, 4 if kind == "float" else 8)
        for arch in (80, 90)
    }
    for row in rows:
        assert row["executed"]
        assert row["spills"] == 0
        assert 8 <= row["registers"] <= 64
        vectors = not row["name"].endswith(" 1>")
        assert ("LDG.128" in row["sass"]) == vectors
        assert ("STG.128" in row["sass"]) == vectors
        for error in row["error"].values():
            assert 0 < error["error"] <= 2 * error["reference_error"]


def test_counters_and_cycles_are_those_of_the_shape(gelu: dict[str, Any]):
    (row,) = (
        row
        for row in gelu["kernels"]
        if (row["name"], row["arch"]) == ("gelu_forward_kernel<__nv_bfloat16, 8>", 80)
    )
    assert row["shapes"] == ["(16, 1536) bfloat16"]
    num_bytes = 2 * 16 * 1536 * 2  # x is read, a is written
    assert row["counters"]["hbm_bytes"] == num_bytes
    assert row["counters"]["mufu"] == 16 * 1536 / 32  # an exponential each
    assert row["modelled_cycles"]["A100"]["binds"] == "HBM"
    per_cycle = 2039 / 1.41 / 108
    assert row["modelled_cycles"]["A100"]["bound"] == pytest.approx(num_bytes / per_cycle, abs=0.1)


def test_an_instance_without_a_case_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    halves = [case for case in command.CASES["gelu"] if case.types[0] == torch.float16]
    monkeypatch.setitem(command.CASES, "gelu", halves)
    assert command.main(["--stem", "gelu", "--arch", "80", "--json"]) == 1
    said = capsys.readouterr()
    missing = [row["name"] for row in json.loads(said.out)["kernels"] if not row["executed"]]
    assert len(missing) == 8
    for name in missing:
        assert f"not executed: {name} of gelu, sm_80" in said.err
    assert "half" not in said.err


def test_the_page_is_that_of_the_kernels(gelu: dict[str, Any]):
    page = PAGE.read_text(encoding="utf-8")
    if f"{gelu['compiler']}," not in page:
        pytest.skip(f"the page is not of {gelu['compiler']}")
    assert kernel_table(gelu["kernels"]) in page, WAY_OUT


def test_the_page_has_every_kernel():
    page = PAGE.read_text(encoding="utf-8")
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu*"))
    for name in {name for source in sources for name in _kernels(source)}:
        assert f"| {name.removesuffix('_kernel')} |" in page, f"{name}: {WAY_OUT}"


def _kernels(source: Path) -> set[str]:
    """Names of the kernels that a file defines."""
    return set(re.findall(r"\b(\w+_kernel)\(const ", source.read_text(encoding="utf-8")))


def test_spills_and_shared_memory_are_seen(tmp_path: Path):
    source = tmp_path / "kernel.cu"
    source.write_text(
        """extern "C" __global__ void __maxnreg__(24) spilling_kernel(float* x) {
          __shared__ float kept[64];
          float at[48];
          #pragma unroll
          for (int i = 0; i < 48; ++i) at[i] = x[threadIdx.x + 64 * i];
          kept[threadIdx.x] = at[0];
          __syncthreads();
          #pragma unroll
          for (int i = 0; i < 48; ++i) x[threadIdx.x * 48 + i] = at[i] * at[47 - i] + kept[i];
        }"""
    )
    code = machine_code(simt.compile_cu(source), 80)["spilling_kernel"]
    assert code.registers == 24
    assert code.spilled_bytes > 0
    assert code.shared_bytes == 256
    assert code.sass["BAR"] == 1
    assert code.sass["LDG.32"] == 48
    assert any(opcode.startswith("STL") for opcode in code.sass)
    assert code.num_instructions == sum(code.sass.values())


@pytest.mark.parametrize(
    ("opcode", "name"),
    [
        ("LDG.E.128.CONSTANT", "LDG.128"),
        ("LDG.E.U16", "LDG.16"),
        ("STG.E", "STG.32"),
        ("LDGSTS.E.BYPASS.128", "LDGSTS.128"),
        ("LDSM.16.M88.4", "LDSM.4"),
        ("MUFU.EX2", "MUFU.EX2"),
        ("HMMA.16816.F32.BF16", "HMMA"),
    ],
)
def test_opcodes_are_told_apart_by_what_matters(opcode: str, name: str):
    assert short(opcode) == name


def test_conversions_between_floats_are_no_work_for_the_special_pipe(tmp_path: Path):
    # Their machine code has F2FP, shifts and HADD2; only to and from integers it has F2I, I2F.
    source = tmp_path / "kernel.cu"
    source.write_text(
        """#include <cuda_bf16.h>
        extern "C" __global__ void converting_kernel(float* x, __nv_bfloat16* y, int* z) {
          y[0] = __float2bfloat16(x[0]);
          z[0] = (int)x[1];
        }"""
    )
    ptx = simt.compile_cu(source)
    insts = simt.launch(
        ptx,
        "converting_kernel",
        1,
        1,
        [torch.ones(2), torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32)],
    ).instructions
    pipes = {inst.text.split()[0]: pipe_of(inst) for inst, _ in insts if inst.op == "cvt"}
    assert pipes == {"cvt.rn.bf16.f32": "integer", "cvt.rzi.s32.f32": "special"}


def test_the_model_gives_flash_attention_the_figures_worked_out_by_hand():
    counted = flash_attention.COUNTED
    # 9216 products of 4096 FLOPs at 2048 a cycle.
    forward = counted["FlashAttention-2", "forward", "257"]
    assert bound(forward, A100) == (pytest.approx(18_432, rel=1e-4), "tensor")
    # 165.6 kB, 53,300 passes, 131.2 kB: launches follow each other.
    backward = counted["FlashAttention-2", "backward", "257"]
    total, binding = bound(backward, A100)
    assert total == pytest.approx(53_300 + (165.6e3 + 131.2e3) / (2039 / 1.41 / 108))
    assert binding == "HBM + shared + HBM"
    # On the H100 mma.sync has a share of the rate of wgmma.
    assert cycles(forward[0], H100)["tensor"] == pytest.approx(9216 / 0.62, rel=1e-4)
    wgmma = counted["FlashAttention-3", "forward", "257"][0]
    assert cycles(wgmma, H100)["tensor"] == pytest.approx(9216, rel=1e-4)


def test_a_wait_lasts_until_all_that_was_asked_for_before_has_moved():
    gpu = dataclasses.replace(A100, num_sms=1, clock_ghz=1.0, dram_gb_s=0.5)  # 2 cycles a byte
    work = Work(issued=4, mma_flops=0, wgmma_flops=0, mufu=0, shared_passes=100, hbm_bytes=90)
    traffic = [
        Traffic("moved", 0, 50),  # until 100
        Traffic("moved", 10, 80),  # and these until 160
        Traffic("awaited", 20, 50),  # 80 early
        Traffic("awaited", 40, 50),  # now at 120: no more to wait for
        Traffic("awaited", 40, 80),  # 40 early
        Traffic("moved", 60, 90),  # at 180, when memory has nothing to do: until 200
        Traffic("awaited", 90, 90),  # at 210
        Traffic("awaited", 100, 90),
    ]
    assert waiting_of(work, traffic, gpu) == Waiting(computing=100, waiting=80 + 40)


def test_waiting_is_that_of_a_cta_alone_on_its_sm(tmp_path: Path):
    source = tmp_path / "kernel.cu"
    source.write_text(
        """#include <cuda_pipeline.h>
        extern "C" __global__ void copying_kernel(const float4* x, float* out) {
          __shared__ float4 kept[64];
          x += 64 * blockIdx.x;
          for (int i = threadIdx.x; i < 64; i += 32) __pipeline_memcpy_async(&kept[i], &x[i], 16);
          __pipeline_commit();
          __pipeline_wait_prior(0);
          out[32 * blockIdx.x + threadIdx.x] = kept[threadIdx.x].x;
        }
        extern "C" __global__ void loading_kernel(const float4* x, float* out) {
          out[32 * blockIdx.x + threadIdx.x] = x[32 * blockIdx.x + threadIdx.x].x;
        }"""
    )
    ptx = simt.compile_cu(source)
    rows = []
    for name in ("copying_kernel", "loading_kernel"):
        instance = Instance("copies", name, 80, MachineCode(8, 0, 0, 0, {"BAR": 1}), 1)
        for num_ctas in (1, 2):  # of two, executed together, no one's traffic is in order
            x, out = torch.ones(num_ctas, 256), torch.empty(num_ctas * 32)
            result = simt.launch(ptx, name, num_ctas, 32, [x, simt.Output(out)], profile=True)
            case = Case(command.CASES["gelu"][0].run, (num_ctas,), (x.dtype,))
            instance.executions.append(Execution(case, "copies", result, work_of(result), {}))
        rows.append(instance.row())
    copying, loading = rows
    assert copying["counted_shape"] == "(2,) float32"
    found = copying["modelled_waiting"]
    assert found["shape"] == "(1,) float32"
    for gpu in (A100, H100):
        asked_for = 64 * 16 / (gpu.dram_gb_s / gpu.clock_ghz / gpu.num_sms)
        assert found[gpu.name]["waiting"] == pytest.approx(asked_for, abs=0.05)
    assert found["A100"]["computing"] == copying["counters"]["warp instructions"] / 2 / 4
    assert "modelled_waiting" not in loading
    header, _, *lines = kernel_table(rows).splitlines()
    assert header.endswith("| modelled cycles | waiting |")
    assert lines[0].endswith(f"| {found['A100']['waiting']:.0f} at (1,) float32 |")
    assert lines[1].endswith(" HBM |  |")
    assert "waiting" not in kernel_table([loading])


def test_the_bound_of_a_dense_case_is_over_what_was_measured():
    # TFLOP/s of forward and backward that FlashAttention-2's repository publishes for an A100 at
    # 1024 and at 2048 tokens, between which the 1370 counted ones lie.
    theirs = {
        (direction, "1370"): flash_attention.COUNTED["FlashAttention-2", direction, "1370"]
        for direction in ("forward", "backward")
    }
    both = flash_attention.compare(theirs, A100)[-1]
    assert both["direction"] == "forward + backward"
    assert both["ratio"] == 1
    for measured in (153, 162):
        assert 0.55 < measured / both["useful_tflop_s_at_bound"] < 0.65


def test_our_kernels_stand_beside_theirs():
    ours = {
        ("forward", "257"): [Work(4 * 6000, 17.9e6, 0, 2000, 5500, 132.6e3)],
        ("backward", "257"): [Work(4 * 16_000, 46.7e6, 0, 2300, 26_800, 264.2e3)],
    }
    rows = flash_attention.compare(ours, A100)
    ratios = {row["direction"]: row["ratio"] for row in rows if row["kernel"] != "ours"}
    # HBM binds our forward, shared memory our backward.
    mine = 132.6e3 / (2039 / 1.41 / 108), 26_800
    assert ratios == {
        "forward": round(18_432 / mine[0], 2),
        "backward": round(75_466 / mine[1], 2),
        "forward + backward": round((18_432 + 75_466) / sum(mine), 2),
    }
    assert {row["kernel"] for row in flash_attention.compare(ours, H100)} == {
        "ours",
        "FlashAttention-2",
        "FlashAttention-3",
    }
    assert "| A100 | forward | 257 |" in attention_table(rows)
    assert not flash_attention.compare({("forward", "50"): []}, A100)


def test_whatever_was_counted_can_be_compared(monkeypatch: pytest.MonkeyPatch):
    code = MachineCode(32, 0, 0, 0, {"LDG.128": 1})
    found = instances(["gelu"], (80,))
    case = command.CASES["gelu"][0]
    monkeypatch.setitem(flash_attention.CASES, "257", case.sizes)  # gelu in attention's place
    execute(found, [case], 80)
    for each in found:
        each.stem = "attention"
        for execution in each.executions:
            execution.case = command.CASES["attention"][0].__class__(
                case.run, case.sizes, (torch.bfloat16,)
            )
    rows = command.beside_flash_attention([*found, Instance("gelu", "other", 80, code, 1)])
    assert {(row["gpu"], row["direction"], row["case"]) for row in rows} == {
        ("A100", direction, "257") for direction in flash_attention.DIRECTIONS
    }
    assert all(row["ratio"] > 0 for row in rows if row["kernel"] != "ours")
