"""`dinov2-fast bench step` and `bench report`, from the words typed to the files written."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dinov2_fast import cli
from dinov2_fast.bench import setting, step
from dinov2_fast.bench.contender import measure_profile, measure_saved_bytes
from dinov2_fast.bench.report import ReportError, headline, markdown, read_rows
from dinov2_fast.bench.setting import StepSetting
from dinov2_fast.errors import ConfigError

TINY = ["--arch", "debug", "--prototypes", "64", "--batch-size", "2", "--steps", "1"]


def step_row(**changes) -> dict:
    row = {
        "kind": "step",
        "arch": "vits14",
        "prototypes": 65536,
        "batch_size": 5,
        "dtype": "fp32",
        "device": "cpu",
        "threads": 2,
        "seconds": {"reference": 8.0, "reference_tuned": 6.0, "fast": 2.0},
        "peak_mib": {"reference": 7000.0, "reference_tuned": 7100.0, "fast": 2000.0},
        "saved_mib": {"reference": 900.0, "fast": 300.0},
        "speed_ratio": 4.0,
        "speed_ratio_range": [3.9, 4.2],
        "speed_ratio_tuned": 3.0,
        "speed_ratio_tuned_range": [2.9, 3.1],
        "memory_ratio": 3.5,
        "memory_ratio_range": [3.5, 3.5],
        "saved_bytes_ratio": 3.0,
        "arithmetic_ratio": 2.4,
        "share_of_matmul": {"reference": 0.5, "fast": 0.8},
        "hardware": "Some CPU",
        "torch": "2.14.1+cpu",
    }
    return {**row, **changes}


def op_row() -> dict:
    return {
        "op": "gelu",
        "backend": "native",
        "dtype": "float32",
        "shape": [4, 8],
        "mode": "forward",
        "device": "cpu",
        "median_us": 10.0,
        "bytes": 100,
        "flops": 0,
        "share_of_copy_bandwidth": 0.75,
        "share_of_equal_copy": 0.85,
        "tflop_s": 0.0,
        "threads": "1",
        "hardware": "Some CPU",
        "torch": "2.14.1",
    }


@pytest.mark.timeout(280)
def test_step_measures_all_contenders_and_writes_a_row(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"

    words = ["--rounds", "1", "--threads", "1", "--json", "--append", str(rows)]
    code = cli.run(["bench", "step", *TINY, *words])

    assert code == 0
    printed = capsys.readouterr()
    row = json.loads(printed.out)
    assert json.loads(rows.read_text()) == row
    assert printed.err.count("round 1/1") == 3
    for name in ("reference", "reference_tuned", "fast"):
        assert row["seconds"][name] > 0
        assert row["peak_mib"][name] > 0
    assert row["speed_ratio"] == row["seconds"]["reference"] / row["seconds"]["fast"]
    assert row["saved_bytes_ratio"] > 2
    assert row["arithmetic_ratio"] > 1
    assert 0 < row["share_of_matmul"]["fast"] < 1.5


def test_ratios_are_of_medians_and_ranges_of_rounds(monkeypatch):
    seconds = {"reference": [8.0, 9.0, 30.0], "reference_tuned": [6.0, 6.0, 6.0]}
    queues = {**seconds, "fast": [2.0, 3.0, 5.0]}

    def measured(name: str, measure: str, setting: StepSetting) -> dict[str, float]:
        if measure == "saved_bytes":
            return {"saved_mib": {"reference": 90.0, "fast": 30.0}[name]}
        return {"seconds": queues[name].pop(0), "peak_mib": 100.0}

    monkeypatch.setattr(step, "_measured", measured)
    row = step.compare_steps(StepSetting(arch="debug", prototypes=8, batch_size=1), rounds=3)

    assert row["speed_ratio"] == 9.0 / 3.0
    assert row["speed_ratio_range"] == [3.0, 6.0]
    assert row["speed_ratio_tuned_range"] == [6.0 / 5.0, 3.0]
    assert row["memory_ratio"] == 1.0
    assert row["saved_bytes_ratio"] == 3.0


def test_kept_bytes_shrink_as_promised():
    setting = StepSetting(arch="debug", prototypes=64, batch_size=4, drop_ratio=0.4, threads=1)
    kept = {name: measure_saved_bytes(name, setting)["saved_mib"] for name in ("reference", "fast")}
    assert kept["reference"] / kept["fast"] > 3


def test_a_profile_gives_shares_of_operators():
    setting = StepSetting(
        arch="debug", prototypes=64, batch_size=2, threads=1, global_px=112, local_px=42
    )
    shares = measure_profile("fast", setting)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert 0.5 < sum(shares.values()) <= 1
    assert "aten::mm" in shares


def test_a_summary_says_the_ratios():
    text = step.summary(step_row())
    assert "4.00 times the reference's speed (3.90 to 4.20)" in text
    assert "3.50 times less memory" in text


def test_a_contender_that_fails_is_named(monkeypatch):
    monkeypatch.setitem(step.CONTENDERS, "reference", {"PYTHONPATH": "/nowhere", "PYTHONHOME": "x"})
    with pytest.raises(step.BenchError, match="reference ended with exit code"):
        step.compare_steps(StepSetting(arch="debug", prototypes=8, batch_size=1), rounds=1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--drop-ratio", "1"], "--drop-ratio must be in [0, 1), got 1.0"),
        (["--arch", "vit"], "model.arch: expected one of"),
        (["--arch", "vits14_reg4"], "no registers"),
        (["--append", "missing/rows.jsonl"], "no folder missing"),
    ],
)
def test_bad_words_are_refused_in_one_line(words, says, capsys):
    assert cli.run(["bench", "step", *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1


def test_report_writes_tables_and_pictures(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    op = op_row()
    slower = {**op, "backend": "reference", "median_us": 25.0}
    lines = [step_row(), step_row(dtype="bf16", speed_ratio=4.5), op, slower]
    rows.write_text("\n".join(json.dumps(line) for line in lines) + "\n")

    assert cli.run(["bench", "report", str(rows)]) == 0

    written = [Path(line) for line in capsys.readouterr().out.split()]
    names = [path.name for path in written]
    assert names == ["rows.md", "rows-speed.svg", "rows-memory.svg"]
    page = written[0].read_text()
    assert "![speed ratios](rows-speed.svg)" in page
    assert "| ViT-S | 65,536 | 5 | fp32 | **4.00** (3.90 to 4.20) |" in page
    assert "| 4, 8 | float32 | forward | 10 | 25 | 2.50 | 75% | 85% |" in page
    for picture in written[1:]:
        root = ElementTree.fromstring(picture.read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.attrib["viewBox"].split()[2:] == [root.attrib["width"], root.attrib["height"]]
    assert "**4.5x**" in headline([step_row(dtype="bf16", speed_ratio=4.5)])


def test_a_row_that_cannot_be_kept_is_said_before_anything_is_measured(tmp_path, capsys):
    assert cli.run(["bench", "step", *TINY, "--append", str(tmp_path)]) == 7
    error = capsys.readouterr().err
    assert f"cannot write --append {tmp_path}" in error
    assert len(error.splitlines()) == 1


def test_report_reads_what_pytest_benchmark_writes(tmp_path):
    file = tmp_path / "run.json"
    info = op_row()
    file.write_text(json.dumps({"benchmarks": [{"extra_info": info}]}))
    assert read_rows([file]) == [info]


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"a": 1}'])
def test_report_refuses_other_files(tmp_path, content):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(ReportError, match=r"x\.json"):
        read_rows([file])


@pytest.mark.parametrize("row", [op_row(), step_row()], ids=["op", "step"])
def test_report_names_what_a_row_lacks(tmp_path, row):
    file = tmp_path / "rows.jsonl"
    del row["hardware"]
    file.write_text(json.dumps(row))
    with pytest.raises(ReportError, match=r"a row of .*rows\.jsonl lacks hardware;"):
        read_rows([file])


def test_report_tells_the_line_that_a_killed_run_left_unfinished(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{json.dumps(op_row())}\n{{"op": "gelu"')
    with pytest.raises(ReportError, match="line 2 column 14"):
        read_rows([file])


def test_report_does_not_overwrite_its_rows(tmp_path, capsys):
    rows = tmp_path / "rows.md"
    rows.write_text(json.dumps(op_row()))
    assert cli.run(["bench", "report", str(rows)]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert json.loads(rows.read_text()) == op_row()


def test_a_gpu_row_has_no_tuned_allocator():
    row = step_row(device="cuda", hardware="Some GPU")
    for key in ("speed_ratio_tuned", "speed_ratio_tuned_range"):
        del row[key]
    page = markdown([row])
    assert "Some GPU, torch 2.14.1" in page
    assert "speed, tuned" not in page


def test_a_system_without_peaks_of_memory_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(setting, "FORGET_PEAK", tmp_path / "clear_refs")
    with pytest.raises(ConfigError, match="which only Linux has, got"):
        StepSetting(arch="debug").checked()


def test_a_gpu_that_is_not_there_is_said():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        StepSetting(device="cuda").checked()
