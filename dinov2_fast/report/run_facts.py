"""What a table about a run says: settings that differ, machine and versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dinov2_fast.config import Config, to_dict


def config_differences(config: Config) -> list[tuple[str, str, str]]:
    """Dotted name, value and default of every setting that is not at its default.

    The path of the images is left out: it tells nothing about the run, and a page that is passed
    on should not tell whose machine it was.
    """
    now, default = _flat(to_dict(config)), _flat(to_dict(Config()))
    different = [key for key in now if now[key] != default[key] and key != "data.path"]
    return [(key, str(now[key]), str(default[key])) for key in different]


def environment_facts() -> dict[str, str]:
    """Machine and versions, without anything that tells whose machine it is."""
    packages = ("dinov2-fast", "torch", "torchvision", "numpy", "pillow")
    versions = [f"{package} {_version(package)}" for package in packages]
    cores = len(os.sched_getaffinity(0))
    machine = f"{_processor_name()}, {cores} cores, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    return {
        "Machine": machine,
        "System": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "Packages": ", ".join(versions),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed as a package)"


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
