from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tools import simt
from tools.simt.proofs.own_programs import OWN

SOURCE = Path(__file__).parent / "programs" / "counters.cu"
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@pytest.fixture(scope="module")
def ptx() -> str:
    return simt.compile_cu(SOURCE, "compute_80")


@pytest.mark.parametrize(("stride", "passes"), [(1, 1), (2, 2), (32, 32), (33, 1)])
def test_shared_passes_of_strided_floats(ptx: str, stride: int, passes: int):
    out = simt.Output(np.zeros(32, np.float32))
    result = simt.launch(ptx, "shared_store", 1, 32, [out, stride], profile=True)
    assert result.counters["shared passes, store"] == passes
    assert result.counters["shared passes, load"] == passes
    assert result.counters["shared passes, store, ideal"] == 1


def test_shared_passes_of_vectors(ptx: str):
    out = simt.Output(np.zeros((32, 4), np.float32))
    result = simt.launch(ptx, "shared_vector", 1, 32, [out], profile=True)
    assert result.counters["shared passes, store"] == 4
    assert result.counters["shared passes, store, ideal"] == 4


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (9, 32)])
def test_sectors_of_strided_loads(ptx: str, stride: int, sectors: int):
    x, out = np.zeros(300, np.float32), simt.Output(np.zeros(32, np.float32))
    result = simt.launch(ptx, "global_load", 1, 32, [x, out, stride], profile=True)
    assert result.counters["global requests, load"] == 1
    assert result.counters["global sectors, load"] == sectors
    assert result.counters["touched bytes, store"] == 128


@pytest.mark.parametrize("name", ["gemm", "hopper gemm"])
def test_a_report_counts_matrix_flops_and_says_that_it_is_modelled(name: str):
    program = next(p for p in OWN if p.name == name)
    _, result = program.run(program.ptx(), profile=True)
    flops = {"gemm": 2 * 128 * 64 * 160, "hopper gemm": 2 * 256 * 64 * 320}[name]
    report = simt.report(result, useful_flops=flops / 2)
    assert report.matrix_flops == flops
    assert report.useful_share == 0.5
    assert str(report).count("modelled lower bound") == 2
    for bound in report.bounds:
        assert bound.cycles[bound.binding] == max(bound.cycles.values())


def test_the_page_runs_as_written(monkeypatch: pytest.MonkeyPatch, capsys):
    root = Path(__file__).parents[3]
    monkeypatch.chdir(root)
    page = (root / "docs" / "simt.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    launched, of_a_device, planted = [text for kind, text in blocks if kind == "python"]
    fault, excerpt = [text for kind, text in blocks if not kind]

    def without_numbers(text: str) -> str:  # another nvcc counts other lines and instructions
        return re.sub(r"[\d.,]+", "#", text.strip())

    names: dict = {}
    exec(launched, names)
    report = without_numbers(capsys.readouterr().out)
    assert all(without_numbers(line) in report for line in excerpt.splitlines())
    out = names["out"].copy()
    exec(of_a_device, names)
    assert np.array_equal(names["out"], out)
    with pytest.raises(simt.Fault) as caught:
        exec(planted, names)
    assert without_numbers(str(caught.value)) == without_numbers(fault)
