"""`dinov2-fast doctor`: what is installed, what runs and computes right here, what clashes."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import re
from importlib import metadata
from typing import Any

import torch

import dinov2_fast
from dinov2_fast import backends, environment, native
from dinov2_fast.errors import ConfigError

_PACKAGES = (
    "torch",
    "numpy",
    "pillow",
    "safetensors",
    "torchvision",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "timm",
    "transformers",
)
_FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12")


def main(as_json: bool) -> int:
    """Print the report.

    Args:
        as_json: print one JSON object instead of text.
    Returns:
        The exit code: 0, or 1 when something is wrong.
    """
    found = report()
    print(json.dumps(found, indent=2) if as_json else format_report(found))
    return 0 if found["ok"] else 1


def report() -> dict[str, Any]:
    """Everything the doctor knows, as plain values that JSON can hold.

    Returns:
        versions, cpu, gpus, extension, ops, self_test, environment, problems, hints, ok.
    """
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    outcomes = _self_test(devices)
    problems = [
        *_faiss_problems(installed_versions(_FAISS)),
        *_torchvision_problems(installed_versions(("torch", "torchvision"))),
        *_extension_problems(),
        *_environment_problems(),
        *(
            f"self-test: {o['op']} on {o['backend']} ({o['device']}, {o['dtype']}): {o['message']}"
            for o in outcomes
            if o["passed"] is False
        ),
    ]
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "extension": _extension(),
        "ops": _ops(),
        "self_test": outcomes,
        "environment": environment.describe(),
        "problems": problems,
        "hints": [*_hints(), *_hints_of_the_self_test(outcomes)],
        "ok": not problems,
    }


def installed_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Distribution -> version of those that are installed."""
    found = {name: next(iter(metadata.distributions(name=name)), None) for name in names}
    return {name: each.version for name, each in found.items() if each is not None}


def _versions() -> dict[str, str]:
    installed = installed_versions(_PACKAGES)
    return {
        "dinov2-fast": dinov2_fast.__version__,
        "extension": native.version() or "not loaded",
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: installed.get(name, "not installed") for name in _PACKAGES},
        "cuda of torch": torch.version.cuda or "none",
    }


def _cpu() -> dict[str, Any]:
    """Processor, and the instruction set that the native kernels will take."""
    levels = native.cpu_levels()
    return {
        "name": str(torch.cpu.get_capabilities().get("cpu_name") or platform.machine()),
        "cores": os.cpu_count() or 0,
        "threads of torch": torch.get_num_threads(),
        "instruction sets of torch": torch.backends.cpu.get_cpu_capability(),
        "instruction sets of the extension": list(levels),
        "in use": _level_in_use(levels),
    }


def _level_in_use(levels: tuple[str, ...]) -> str:
    """The instruction set native kernels take, or why they take none."""
    if not levels:
        return "none: the extension is not loaded"
    try:
        asked = environment.cpu_level()
    except ConfigError as error:
        return f"none: {error}"
    if asked == "auto":
        return levels[-1]
    known = ", ".join(levels)
    return asked if asked in levels else f"none: {asked} is asked for, possible are {known}"


def _gpus() -> list[dict[str, Any]]:
    gpus: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "compute capability": f"{properties.major}.{properties.minor}",
                "memory GiB": round(properties.total_memory / 2**30, 1),
            }
        )
    return gpus


def _extension() -> dict[str, Any]:
    return {
        "loaded": not native.why_not(),
        "why_not": native.why_not(),
        "version": native.version(),
        "cuda_archs": list(native.cuda_archs()),
    }


def _ops() -> list[dict[str, Any]]:
    """The table op x device x backend."""
    return [
        {
            "op": op,
            "device": device,
            "backend": backend,
            "available": not why_not,
            "why_not": why_not,
            "first_choice": backend == _first_choice(op, device),
        }
        for op in backends.PREFERENCE
        for device in ("cpu", "cuda")
        for backend, why_not in backends.availability(op, device).items()
    ]


def _first_choice(op: str, device: str) -> str:
    """The backend that automatic choice takes for an op's usual float types."""
    possible = backends.availability(op, device)
    return next(b for b in backends.order_of(op, device) if not possible[b])


def _self_test(devices: tuple[str, ...]) -> list[dict[str, Any]]:
    """Outcomes as dictionaries; an error while importing the ops is an outcome too."""
    try:
        from dinov2_fast.self_test import TIME_LIMIT_S, run_self_test

        outcomes = run_self_test(devices, time_limit_s=TIME_LIMIT_S)
    except Exception as error:  # a report must outlive whatever is broken
        return [
            {
                "op": "import",
                "backend": "all",
                "device": "cpu",
                "dtype": "",
                "passed": False,
                "error": None,
                "limit": None,
                "seconds": 0.0,
                "message": f"{type(error).__name__}: {error}",
            }
        ]
    rows = [dataclasses.asdict(outcome) for outcome in outcomes]
    for row in rows:
        if row["error"] != row["error"]:
            row["error"] = None  # JSON has no NaN
    return rows


def _faiss_problems(installed: dict[str, str]) -> list[str]:
    """Several distributions that write the same module `faiss`."""
    if len(installed) < 2:
        return []
    names = " and ".join(sorted(installed))
    return [
        f"{names} are both installed and overwrite each other's module faiss; "
        f"uninstall all of them, then install one"
    ]


def _torchvision_problems(installed: dict[str, str]) -> list[str]:
    """A torchvision that was not built for the installed torch: by version, by running an op."""
    problems: list[str] = []
    torch_version, vision_version = installed.get("torch"), installed.get("torchvision")
    if vision_version is None:  # nothing of ours runs it; the tests and timm do
        return problems
    wanted = _matching_torchvision(torch_version or torch.__version__)
    if wanted and not vision_version.startswith(wanted + "."):
        problems.append(
            f"torchvision {vision_version} is not the partner of torch {torch_version}; "
            f"pip install 'torchvision=={wanted}.*'"
        )
    why_not = _torchvision_op_problem()
    if why_not:
        problems.append(f"torchvision's compiled ops do not run: {why_not}")
    return problems


def _matching_torchvision(torch_version: str) -> str:
    """Torchvision's major.minor for a torch 2 release: 2.N goes with 0.(N + 15); "" if unknown."""
    match = re.match(r"2\.(\d+)", torch_version)
    return f"0.{int(match.group(1)) + 15}" if match else ""


@functools.cache
def _torchvision_op_problem() -> str:
    """Empty when torchvision::nms runs, else why not."""
    try:
        import torchvision

        boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [5.0, 5.0, 6.0, 6.0]])
        kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
    except Exception as error:  # ImportError, or RuntimeError for a missing operator
        return f"{type(error).__name__}: {error}"
    return "" if kept == [0, 2] else f"nms kept {kept} instead of [0, 2]"


def _extension_problems() -> list[str]:
    """An extension that fails to load, is of another version, or computes wrongly here."""
    why_not = native.why_not()
    if why_not:
        return [] if "not built" in why_not else [f"extension: {why_not}"]
    if native.version() != dinov2_fast.__version__:
        return [
            f"extension: built from version {native.version()}, the package is "
            f"{dinov2_fast.__version__}; run `pip install .` again"
        ]
    return [
        f"processor: products of bf16 matrices by {level} come out wrong, attention takes float's"
        for level in native.wrong_bf16_products()
    ]


def _environment_problems() -> list[str]:
    """Variables that nothing reads, and values that are refused."""
    unknown = [
        f"environment: nothing reads {name}; known: "
        + ", ".join(variable.name for variable in environment.VARIABLES)
        for name in environment.unknown_variables()
    ]
    invalid = [
        f"environment: {row['value'].removeprefix('invalid (').removesuffix(')')}"
        for row in environment.describe()
        if row["value"].startswith("invalid (")
    ]
    level = _level_in_use(native.cpu_levels())
    if "possible are" in level:
        invalid.append(f"environment: {environment.CPU_LEVEL.name}: {level.removeprefix('none: ')}")
    return unknown + invalid


def _hints() -> list[str]:
    """What would make it faster; nothing here is wrong."""
    hints: list[str] = []
    if "not built" in native.why_not():
        hints.append(f"no native kernels: {native.why_not()}")
    if torch.cuda.is_available() and not native.why_not():
        why_not = native.why_not_for("swiglu", "cuda")
        if why_not:
            hints.append(f"no native CUDA kernels: {why_not}")
    if torch.get_num_threads() > (os.cpu_count() or 1):
        hints.append(f"torch uses {torch.get_num_threads()} threads on {os.cpu_count()} cores")
    return hints


def _hints_of_the_self_test(outcomes: list[dict[str, Any]]) -> list[str]:
    """What it could not say because its time was over, as on a busy machine."""
    num_late = sum(outcome["passed"] is None for outcome in outcomes)
    if not num_late:
        return []
    return [
        f"self-test: {num_late} of {len(outcomes)} comparisons had no time; "
        "run doctor again when the machine is less busy"
    ]


def format_report(found: dict[str, Any]) -> str:
    """The report as text of at most 100 columns or so."""
    lines = ["versions", *_pairs(found["versions"]), "", "processor", *_pairs(found["cpu"]), ""]
    lines += ["GPUs", *(f"  {_joined(gpu)}" for gpu in found["gpus"])]
    lines += [] if found["gpus"] else ["  none that torch can use"]
    extension = found["extension"]
    archs = ", ".join(_arch_name(arch) for arch in extension["cuda_archs"]) or "none"
    state = f"loaded, CUDA code for: {archs}" if extension["loaded"] else extension["why_not"]
    lines += ["", "extension", f"  {state}", "", "ops (* = taken unless another is asked for)"]
    for op in dict.fromkeys(row["op"] for row in found["ops"]):
        for device in ("cpu", "cuda"):
            rows = [r for r in found["ops"] if (r["op"], r["device"]) == (op, device)]
            usable = [r["backend"] + "*" * r["first_choice"] for r in rows if r["available"]]
            lines.append(f"  {op:17} {device:5} {' '.join(usable)}")
            reasons = (r for r in rows if not r["available"] and "has no" not in r["why_not"])
            lines += [f"  {'':23}{r['backend']}: {r['why_not']}" for r in reasons]
    lines += ["", "self-test"]
    for row in found["self_test"]:
        verdict = {True: "ok", False: "FAILED", None: "-"}[row["passed"]]
        error = "" if row["error"] is None else f"error {row['error']:.1e} of {row['limit']:.0e}"
        where = f"{row['op']:17} {row['backend']:10} {row['device']:5} {row['dtype']:9}"
        lines.append(f"  {where} {verdict:7}{error} {row['message']}".rstrip())
    lines += ["", "environment"]
    lines += [f"  {row['name']:27} {row['value'] or '(unset)'}" for row in found["environment"]]
    for title in ("hints", "problems"):
        lines += ["", title, *(f"  - {text}" for text in found[title] or ["none"])]
    return "\n".join(lines)


def _arch_name(arch: str) -> str:
    """An architecture as NVIDIA's tools call it: machine code sm_80, portable code PTX 90."""
    number, _, form = arch.partition("-")
    return f"PTX {number}" if form == "virtual" else f"sm_{number}"


def _pairs(values: dict[str, Any]) -> list[str]:
    """One aligned line for each name and value."""
    width = max(len(name) for name in values)
    shown = {n: ", ".join(v) if isinstance(v, list) else v for n, v in values.items()}
    return [f"  {name:{width}}  {value}" for name, value in shown.items()]


def _joined(values: dict[str, Any]) -> str:
    """Names and values on one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items())
