from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from dinov2_fast import backends, doctor, native, self_test


@pytest.fixture(scope="module")
def found() -> dict:
    return doctor.report()


@pytest.fixture
def no_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_self_test", lambda devices: [])


def test_report_is_json_and_covers_every_op_and_backend(found: dict):
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    table = {(row["op"], row["device"], row["backend"]) for row in found["ops"]}
    assert table == {
        (op, device, backend)
        for op in backends.PREFERENCE
        for device in ("cpu", "cuda")
        for backend in backends.BACKENDS
    }
    for row in found["ops"]:
        assert row["available"] != bool(row["why_not"])
    firsts = [(row["op"], row["device"]) for row in found["ops"] if row["first_choice"]]
    assert len(firsts) == len(set(firsts)) == 2 * len(backends.PREFERENCE)


def test_self_test_passes_on_everything_available_within_its_time(found: dict):
    tested = {(row["op"], row["backend"]) for row in found["self_test"]}
    available = {
        (row["op"], row["backend"])
        for row in found["ops"]
        if row["available"] and (row["device"] == "cpu" or torch.cuda.is_available())
    }
    assert tested == available
    failed = [row for row in found["self_test"] if row["passed"] is not True]
    assert failed == []
    assert sum(row["seconds"] for row in found["self_test"]) < self_test.TIME_LIMIT_S


def test_text_shows_versions_reasons_and_verdicts(found: dict):
    text = doctor.format_report(found)
    assert f"torch          {torch.__version__.split('+')[0]}" in text
    assert "swiglu" in text
    if not torch.cuda.is_available() and not native.why_not() and native.cuda_archs():
        assert "native: torch sees no CUDA device" in text
    for problem in found["problems"] or ["none"]:
        assert problem in text


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch):
    def broken(dtype: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
        wrong = 0.0 if dtype == torch.float64 else 1e-3
        return [torch.ones(3, dtype=dtype) + wrong]

    monkeypatch.setattr(self_test, "_TRIALS", {"koleo": broken})
    outcome = self_test.run_self_test(("cpu",), time_limit_s=5.0)[0]
    assert outcome.passed is False
    assert "relative error 0.001 is over 1e-05" in outcome.message
    report = doctor.report()
    assert report["ok"] is False
    assert any("self-test: koleo on reference" in problem for problem in report["problems"])


def test_a_raising_or_nan_kernel_is_found_and_the_report_lives(monkeypatch: pytest.MonkeyPatch):
    def raising(dtype: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
        raise RuntimeError("no luck")

    def nan(dtype: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
        return [torch.full((3,), torch.nan if dtype == torch.float32 else 1.0, dtype=dtype)]

    monkeypatch.setattr(self_test, "_TRIALS", {"koleo": raising, "sinkhorn": nan})
    rows = [row for row in doctor._self_test(("cpu",)) if row["backend"] == "reference"]
    assert [row["passed"] for row in rows] == [False, False]
    assert rows[0]["message"] == "RuntimeError: no luck"
    json.dumps(rows, allow_nan=False)


def test_self_test_stops_at_its_time_limit_and_says_so(monkeypatch: pytest.MonkeyPatch):
    outcomes = self_test.run_self_test(("cpu",), time_limit_s=-1.0)
    assert {outcome.passed for outcome in outcomes} == {None}
    monkeypatch.setattr(self_test, "TIME_LIMIT_S", -1.0)
    found = doctor.report()
    late = f"{len(outcomes)} of {len(outcomes)} comparisons had no time"
    assert any(late in hint for hint in found["hints"])


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({"faiss-cpu": "1.15.1", "faiss-gpu": "1.15.1"}, "faiss-cpu and faiss-gpu are both"),
        ({"torch": "2.14.1", "torchvision": "0.28.0"}, "pip install 'torchvision==0.29.*'"),
        ({"torch": "2.9.0+cpu", "torchvision": "0.25.1"}, "pip install 'torchvision==0.24.*'"),
    ],
    ids=["faiss", "newer torch", "older torch"],
)
def test_clashes_between_packages_are_problems(
    versions: dict[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    no_self_test: None,
):
    def installed(names: tuple[str, ...]) -> dict[str, str]:
        return {name: version for name, version in versions.items() if name in names}

    monkeypatch.setattr(doctor, "installed_versions", installed)
    problems = doctor.report()["problems"]
    assert any(expected in problem for problem in problems)


@pytest.mark.parametrize(
    ("torch_version", "expected"),
    [("2.14.1", "0.29"), ("2.9.0+cu130", "0.24"), ("2.15.0a0+git1234", "0.30"), ("3.0.0", "")],
)
def test_torchvision_partner_of_a_torch_version(torch_version: str, expected: str):
    assert doctor._matching_torchvision(torch_version) == expected


def test_one_faiss_and_the_matching_torchvision_are_no_problem():
    assert doctor._faiss_problems({"faiss-cpu": "1.15.1"}) == []
    assert doctor._torchvision_problems({"torch": "2.14.1", "torchvision": "0.29.9"}) == []
    assert doctor._torchvision_problems({"torch": "2.14.1"}) == []


def test_torchvision_without_its_compiled_ops_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    def nms(*arguments: object) -> torch.Tensor:
        raise RuntimeError("operator torchvision::nms does not exist")

    broken = types.SimpleNamespace(ops=types.SimpleNamespace(nms=nms))
    doctor._torchvision_op_problem.cache_clear()
    monkeypatch.setitem(sys.modules, "torchvision", broken)
    (problem,) = doctor._torchvision_problems({"torch": "2.14.1", "torchvision": "0.29.1"})
    doctor._torchvision_op_problem.cache_clear()
    assert "operator torchvision::nms does not exist" in problem


def test_an_extension_of_another_version_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, no_self_test: None
):
    monkeypatch.setattr(native, "_load", lambda: (types.SimpleNamespace(version="0.0.1"), ""))
    assert any("built from version 0.0.1" in problem for problem in doctor._extension_problems())


def test_a_missing_extension_is_a_hint_and_a_broken_one_a_problem(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(native, "_load", lambda: (None, "the extension is not built; build it"))
    assert doctor._extension_problems() == []
    assert any("no native kernels" in hint for hint in doctor._hints())
    monkeypatch.setattr(native, "_load", lambda: (None, "the extension failed to import: symbol"))
    assert doctor._extension_problems() == ["extension: the extension failed to import: symbol"]


def test_products_that_come_out_wrong_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, on_native: None
):
    monkeypatch.setattr(native, "wrong_bf16_products", lambda: ("amx",))
    problems = doctor._extension_problems()
    assert len(problems) == 1
    assert "products of bf16 matrices by amx come out wrong" in problems[0]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("DINOV2_FAST_BAKEND", "native", "nothing reads DINOV2_FAST_BAKEND"),
        (
            "DINOV2_FAST_BACKEND",
            "fast",
            "expected one of auto, reference, native, triton, flash_attn",
        ),
        (
            "DINOV2_FAST_CPU_LEVEL",
            "sse9",
            "expected one of auto, baseline, avx2, avx512, avx512_bf16, amx",
        ),
    ],
)
def test_environment_mistakes_are_problems(
    name: str, text: str, expected: str, monkeypatch: pytest.MonkeyPatch, no_self_test: None
):
    monkeypatch.setenv(name, text)
    found = doctor.report()
    assert any(expected in problem for problem in found["problems"])
    assert expected in doctor.format_report(found)


def test_main_prints_either_form_and_returns_the_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, found: dict
):
    monkeypatch.setattr(doctor, "report", lambda: found)
    code = doctor.main(as_json=True)
    assert json.loads(capsys.readouterr().out) == found
    assert doctor.main(as_json=False) == code == (0 if found["ok"] else 1)
    assert capsys.readouterr().out.startswith("versions\n")
