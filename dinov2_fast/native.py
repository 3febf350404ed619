"""The compiled extension `dinov2_fast._native`: loaded on first use, or the reason why not."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

from dinov2_fast.errors import BackendUnavailable

# Tests set it: CUDA kernels then compute on tensors of the CPU, executed without a GPU.
cuda_on_cpu = False

# Compute capability that the CUDA kernels need: cp.async, and products of bfloat16.
_OLDEST = (8, 0)


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The extension and "", or None and why it did not load."""
    try:
        return importlib.import_module("dinov2_fast._native"), ""
    except ModuleNotFoundError as error:
        if error.name != "dinov2_fast._native":
            return None, f"the extension failed to import: {error}"
        return None, "the extension is not built; run `pip install .` in the project's folder"
    except ImportError as error:  # wrong Python, missing libgomp, truncated file, ...
        return None, f"the extension failed to import: {error}"


def why_not() -> str:
    """Empty when the extension loads, else why it does not."""
    return _load()[1]


def module() -> Any:
    """The extension; its functions are typed in C++ and documented by their docstrings.

    Raises:
        BackendUnavailable: it is not built or does not load here.
    """
    loaded, reason = _load()
    if loaded is None:
        raise BackendUnavailable(f"native: expected dinov2_fast._native to load, but {reason}")
    return loaded


def version() -> str:
    """Package version the extension was built from; empty without an extension."""
    loaded = _load()[0]
    return "" if loaded is None else str(loaded.version)


def cuda_archs() -> tuple[str, ...]:
    """Compute capabilities the extension holds code for ("80", "90", ...); empty without CUDA."""
    loaded = _load()[0]
    return () if loaded is None else tuple(str(loaded.cuda_archs).split())


def cpu_levels() -> tuple[str, ...]:
    """Instruction sets the CPU kernels can use on this processor, narrowest first."""
    loaded = _load()[0]
    return () if loaded is None else tuple(loaded.cpu_levels())


def wrong_bf16_products() -> tuple[str, ...]:
    """Instruction sets of this processor whose products of bf16 matrices come out wrong."""
    loaded = _load()[0]
    return () if loaded is None else tuple(loaded.wrong_bf16_products_cpu())


def why_not_for(op: str, device_type: str) -> str:
    """Empty when the extension has kernels of the op for the device type, else why not.

    Args:
        op: stem of the op, for instance "swiglu".
        device_type: "cpu" or "cuda".
    """
    loaded, reason = _load()
    if loaded is None:
        return reason
    if device_type == "cuda":
        reason = _why_not_cuda()
        if reason:
            return reason
    kernels = (name for name in dir(loaded) if name.endswith(f"_{device_type}"))
    if not any(name.startswith(f"{op}_") for name in kernels):
        return f"the extension has no {device_type} kernel for {op}"
    return ""


def kernels_for(device_type: str) -> str:
    """The device type whose kernels compute on tensors of a device type: the same but in tests."""
    return "cuda" if cuda_on_cpu and device_type == "cpu" else device_type


def place_of(backend: str, device_type: str) -> str:
    """The device type whose kernels of a backend compute on tensors of a device type.

    Args:
        backend: one that has kernels.
        device_type: of the tensors.
    """
    return device_type if backend == "triton" else kernels_for(device_type)


def _why_not_cuda() -> str:
    """Empty when the extension's CUDA code runs on the current GPU, else why not."""
    archs = cuda_archs()
    if not archs:
        return "the extension was built without CUDA (no nvcc, or DINOV2_FAST_BUILD=cpu)"
    if cuda_on_cpu:
        return ""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if not any(runs_on(arch, major, minor) for arch in archs):
        way = f"rebuild with DINOV2_FAST_CUDA_ARCHS={major}{minor}"
        if (major, minor) < _OLDEST:
            way = "its CUDA kernels need {}{} or later".format(*_OLDEST)
        return f"the extension holds code for {', '.join(archs)}, the GPU is {major}{minor}; {way}"
    return ""


def runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code for an architecture runs on a GPU of compute capability major.minor.

    Args:
        arch: as CMake spells it: "80" or "80-real" machine code, "90-virtual" PTX, "90a" one chip.
        major: first digit of the GPU's compute capability.
        minor: second digit of the GPU's compute capability.
    """
    number, _, form = arch.partition("-")
    base = number.rstrip("af")
    arch_major, arch_minor = int(base[:-1]), int(base[-1])
    if number != base:
        return (arch_major, arch_minor) == (major, minor)
    if form != "real" and (major, minor) >= (arch_major, arch_minor):
        return True  # PTX is compiled on for any later GPU
    return major == arch_major and minor >= arch_minor
